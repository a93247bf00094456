"""LoRA backend ``elora_torch``: eager torch, used on CPUs and as a reference for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from sglang_elora.pages import EMBEDDING, OUTPUT_LAYER, ModuleShape, PagedAdapter, WeightRef
from sglang_elora.srt.lora.grouped_rows import Index, expand_rows, rows_by_adapter, shrink_rows
from sglang_elora.srt.lora.lora_backend import TORCH, Graph, PagedLoRABackend, Segment


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one adapter in a batch, or its routes to one expert."""

    adapter: PagedAdapter
    index: Index
    expert: int = 0


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The rows of each adapter in one forward pass. SGLang's layers read ``has_active_lora``."""

    groups: tuple[Rows, ...]
    num_rows: int
    use_cuda_graph = False

    @property
    def expected_tokens(self) -> int:
        return self.num_rows

    @property
    def has_active_lora(self) -> bool:
        return bool(self.groups)

    def groups_with(self, module: str, x: torch.Tensor) -> list[Rows]:
        """The groups whose adapter has the module; ``x`` are all input rows of the batch."""
        assert len(x) >= self.num_rows, f"{module}: {len(x)} rows in a batch of {self.num_rows}"
        return [group for group in self.groups if group.adapter.has(module)]

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> PagedBatch:
        """Build from segments in row order; segments of one adapter become one group."""
        adapters = {id(adapter): adapter for adapter, _ in segments if adapter is not None}
        rows, num_rows = rows_by_adapter(
            ((None if adapter is None else id(adapter), length) for adapter, length in segments),
            device,
        )
        return cls(tuple(Rows(adapters[key], index) for key, index in rows.items()), num_rows)


class EloraTorchBackend(PagedLoRABackend):
    """A backend with two matrix products per adapter and module. CUDA graphs cannot replay it."""

    name = TORCH
    _groups: Sequence[Rows] = ()  # of the last batch with adapters

    def set_model(
        self, shapes: Sequence[ModuleShape], dtype: torch.dtype, *, max_rank: int, tp_size: int
    ) -> None:
        self._dtype = dtype
        self._out_features = {shape.name: shape.out_features for shape in shapes}

    def set_batch(self, segments: Sequence[Segment], graph: Graph | None = None) -> None:
        assert graph is None, "elora_torch runs eagerly"
        self.batch_info = self.batch_of(segments)
        adapters = {id(group.adapter) for group in self.batch_info.groups}
        for group in self._groups:
            group.adapter.forget_copies(free=id(group.adapter) not in adapters)
        self._groups = self.batch_info.groups

    def adapts(self, module: str, batch: PagedBatch | None = None) -> bool:
        return any(group.adapter.has(module) for group in (batch or self._batch).groups)

    def batch_of(self, segments: Sequence[Segment]) -> PagedBatch:
        return PagedBatch.of(segments, self.device)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """``A[:, token] * scaling`` of each row's adapter.

        Returns:
            As ``shrink``.
        """
        part_size = self.vocabulary[EMBEDDING].part_size
        groups = self._batch.groups_with(EMBEDDING, tokens)
        width = max((group.adapter.rank for group in groups), default=0)
        output = torch.zeros(len(tokens), width, dtype=self._dtype, device=tokens.device)
        for group in groups:
            own, adapter = tokens[group.index], group.adapter
            columns = output.new_zeros(len(own), adapter.rank)
            layers = own // part_size
            for layer in set(layers.tolist()) & set(range(self.vocabulary[EMBEDDING].num_layers)):
                here = (layers == layer).nonzero().flatten()
                columns[here] = adapter.a_columns(layer, EMBEDDING, own[here] % part_size)
            output[group.index, : adapter.rank] = columns * adapter.scaling
        return output

    def routes(self, topk_ids: torch.Tensor) -> PagedBatch:
        num_rows, num_choices = topk_ids.shape
        numbers = torch.arange(num_rows * num_choices, device=topk_ids.device).view_as(topk_ids)
        groups = []
        for group in self._batch.groups:
            own, experts = numbers[group.index], topk_ids[group.index]
            for expert in experts.unique().tolist():
                if expert >= 0:
                    groups.append(Rows(group.adapter, own[experts == expert], expert))
        return PagedBatch(tuple(groups), numbers.numel())

    def shrink(
        self, x: torch.Tensor, weights: WeightRef, batch: PagedBatch | None = None
    ) -> torch.Tensor:
        """Compute ``x @ A^T * scaling`` of each row's adapter.

        Returns:
            ``[rows, widest adapter's parts * rank]``; zero where an adapter has no such column,
            or a row has no adapter.
        """
        if batch is not None and batch.num_rows > len(x):  # routes
            x = x.repeat_interleave(batch.num_rows // len(x), dim=0)
        groups = (batch or self._batch).groups_with(weights.module, x)
        matrices = [g.adapter.a(weights.layer, weights.module, g.expert) for g in groups]
        width = max((len(a) for a in matrices), default=0)
        output = x.new_zeros(len(x), width)
        for group, a in zip(groups, matrices, strict=True):
            shrink_rows(x, group.index, a, group.adapter.scaling, output)
        return output

    def expand(
        self,
        inner: torch.Tensor,
        weights: WeightRef,
        output: torch.Tensor,
        batch: PagedBatch | None = None,
    ) -> torch.Tensor:
        ends = [0, *accumulate(self._out_features[weights.module])]
        for group in (batch or self._batch).groups_with(weights.module, inner):
            adapter = group.adapter
            parts = (
                (start, end, adapter.b(weights.layer, weights.module, part, group.expert))
                for part, (start, end) in enumerate(pairwise(ends))
            )
            expand_rows(inner, group.index, parts, adapter.rank, output)
        return output

    def expand_logits(
        self,
        inner: torch.Tensor,
        output: torch.Tensor,
        batch: PagedBatch | None = None,
    ) -> torch.Tensor:
        groups = (batch or self._batch).groups_with(OUTPUT_LAYER, inner)
        for layer, (start, end) in enumerate(self.vocabulary[OUTPUT_LAYER].parts):
            for group in groups:
                b = group.adapter.b(layer, OUTPUT_LAYER, 0)[:, : end - start]
                parts = [(0, end - start, b)]
                expand_rows(inner, group.index, parts, group.adapter.rank, output[:, start:end])
        return output

    @property
    def _batch(self) -> PagedBatch:
        assert isinstance(self.batch_info, PagedBatch), "a forward pass without its batch"
        return self.batch_info
