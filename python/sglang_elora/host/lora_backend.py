"""LoRA backend ``elora_torch``: eager torch that reads weights where they lie, in KV pages.

SGLang's LoRA layers call a backend with the slabs they were given; ours were given
``WeightRef``s. The batch says which rows belong to which adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend

from sglang_elora.pages import PagedAdapter, WeightRef

Segment = tuple[PagedAdapter | None, int]
"""(adapter or None, number of token rows)"""

_NO_EMBEDDINGS = "adapters on embed_tokens or lm_head are refused with --elora"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one adapter in a batch: a slice where they are adjacent, else int64 indices."""

    adapter: PagedAdapter
    index: slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """What one forward pass computes for which rows. SGLang's layers read ``has_active_lora``."""

    groups: tuple[Rows, ...]
    num_rows: int

    @property
    def has_active_lora(self) -> bool:
        return bool(self.groups)

    def groups_with(self, module: str, x: torch.Tensor) -> list[Rows]:
        """The groups whose adapter has the module; ``x`` are its input rows, all of the batch."""
        assert len(x) >= self.num_rows, f"{module}: {len(x)} rows in a batch of {self.num_rows}"
        return [group for group in self.groups if group.adapter.has(module)]

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> PagedBatch:
        """Segments in row order; those of one adapter become one group."""
        pieces: dict[int, tuple[PagedAdapter, list[range]]] = {}
        start = 0
        for adapter, length in segments:
            end = start + length
            if adapter is not None and length:
                ranges = pieces.setdefault(id(adapter), (adapter, []))[1]
                if ranges and ranges[-1].stop == start:
                    ranges[-1] = range(ranges[-1].start, end)
                else:
                    ranges.append(range(start, end))
            start = end
        groups = tuple(Rows(adapter, _index(ranges, device)) for adapter, ranges in pieces.values())
        return cls(groups, start)


def _index(ranges: Sequence[range], device: torch.device) -> slice | torch.Tensor:
    if len(ranges) == 1:
        return slice(ranges[0].start, ranges[0].stop)
    return torch.tensor([row for rows in ranges for row in rows], device=device)


class EloraTorchBackend(BaseLoRABackend):
    """Two matrix products per adapter and module; the reference for kernels, and the CPU's path."""

    name = "elora_torch"
    skip_inactive_lora_batches = True  # a batch without adapters takes the plain layers' path

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: Any) -> None:
        super().__init__(max_loras_per_batch, device)

    def set_batch(self, segments: Sequence[Segment]) -> None:
        """What the next forward pass computes. ``reset_batch_state`` undoes it."""
        self.batch_info = PagedBatch.of(segments, self.device)

    def prepare_lora_batch(self, *_: Any, **__: Any) -> None:
        """Refused: SGLang's does nothing, so the last batch's adapters would be computed again."""
        raise NotImplementedError("elora_torch takes its batches from set_batch")

    def run_lora_a_embedding(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refused: SGLang's returns nothing."""
        raise NotImplementedError(_NO_EMBEDDINGS)

    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: WeightRef, *_: Any, **options: Any
    ) -> torch.Tensor:
        """``x @ A^T * scaling`` of each row's adapter.

        Args:
            x: ``[rows, in_features]``.

        Returns:
            ``[rows, widest adapter's parts * rank]``; zero where an adapter has no such column,
            or a row has no adapter. Equal in width on all tensor-parallel ranks.

        Raises:
            NotImplementedError: The layer is ``lm_head``, whose rows are not the batch's.
        """
        if "pruned_batch_info" in options:
            raise NotImplementedError(_NO_EMBEDDINGS)
        groups = self._batch.groups_with(weights.module, x)
        matrices = [group.adapter.a(weights.layer, weights.module) for group in groups]
        width = max((len(a) for a in matrices), default=0)
        output = x.new_zeros(len(x), width)
        for group, a in zip(groups, matrices, strict=True):
            rows = output[group.index, : len(a)]
            rows.addmm_(x[group.index], a.T, beta=0, alpha=group.adapter.scaling)
            if not isinstance(group.index, slice):  # rows is a copy
                output[group.index, : len(a)] = rows
        return output

    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: WeightRef,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """Add ``x @ B^T`` of each row's adapter into ``base_output``, part by part, in place.

        Args:
            x: What ``run_lora_a_sgemm`` returned for the same module.
            output_offset_cpu: Where each part begins in the output's columns, and the end.
            base_output: ``[rows, sum of out_features]``.
        """
        ends = output_offset_cpu.tolist()
        for group in self._batch.groups_with(weights.module, x):
            inner = x[group.index]
            output = base_output[group.index]
            rank = group.adapter.rank
            for part, (start, end) in enumerate(pairwise(ends)):
                b = group.adapter.b(weights.layer, weights.module, part)
                output[:, start:end].addmm_(inner[:, part * rank : (part + 1) * rank], b)
            if not isinstance(group.index, slice):  # output is a copy
                base_output.index_copy_(0, group.index, output)
        return base_output

    def run_qkv_lora(
        self, x: torch.Tensor, qkv_lora_a: WeightRef, qkv_lora_b: WeightRef, **options: Any
    ) -> torch.Tensor:
        return self._both(x, qkv_lora_a, qkv_lora_b, options)

    def run_gate_up_lora(
        self, x: torch.Tensor, gate_up_lora_a: WeightRef, gate_up_lora_b: WeightRef, **options: Any
    ) -> torch.Tensor:
        return self._both(x, gate_up_lora_a, gate_up_lora_b, options)

    def _both(
        self, x: torch.Tensor, a: WeightRef, b: WeightRef, options: dict[str, Any]
    ) -> torch.Tensor:
        inner = self.run_lora_a_sgemm(x, a)
        return self.run_lora_b_sgemm(inner, b, options["output_offset_cpu"], options["base_output"])

    @property
    def _batch(self) -> PagedBatch:
        assert isinstance(self.batch_info, PagedBatch), "a forward pass without its batch"
        return self.batch_info


def register_backend() -> None:
    """Make ``--lora-backend elora_torch`` known. Once per process."""
    register_lora_backend(EloraTorchBackend.name)(lambda: EloraTorchBackend)
