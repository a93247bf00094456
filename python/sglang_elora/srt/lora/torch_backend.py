"""LoRA backend ``elora_torch``: eager torch, used on CPUs and as a reference for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from sglang_elora.pages import ModuleShape, PagedAdapter, WeightRef
from sglang_elora.srt.lora.lora_backend import TORCH, Graph, PagedLoRABackend, Segment


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one adapter in a batch: a slice if adjacent, otherwise int64 indices."""

    adapter: PagedAdapter
    index: slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The rows of each adapter in one forward pass. SGLang's layers read ``has_active_lora``."""

    groups: tuple[Rows, ...]
    num_rows: int

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


class EloraTorchBackend(PagedLoRABackend):
    """A backend with two matrix products per adapter and module. CUDA graphs cannot replay it."""

    name = TORCH

    def set_model(
        self, shapes: Sequence[ModuleShape], dtype: torch.dtype, *, max_rank: int, tp_size: int
    ) -> None:
        self._out_features = {shape.name: shape.out_features for shape in shapes}

    def set_batch(self, segments: Sequence[Segment], graph: Graph | None = None) -> None:
        assert graph is None, "elora_torch runs eagerly"
        self.batch_info = PagedBatch.of(segments, self.device)

    def shrink(self, x: torch.Tensor, weights: WeightRef) -> torch.Tensor:
        """Compute ``x @ A^T * scaling`` of each row's adapter.

        Returns:
            ``[rows, widest adapter's parts * rank]``; zero where an adapter has no such column,
            or a row has no adapter.
        """
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

    def expand(self, inner: torch.Tensor, weights: WeightRef, output: torch.Tensor) -> torch.Tensor:
        ends = [0, *accumulate(self._out_features[weights.module])]
        for group in self._batch.groups_with(weights.module, inner):
            own_inner = inner[group.index]
            own_output = output[group.index]
            rank = group.adapter.rank
            for part, (start, end) in enumerate(pairwise(ends)):
                b = group.adapter.b(weights.layer, weights.module, part)
                own_output[:, start:end].addmm_(own_inner[:, part * rank : (part + 1) * rank], b)
            if not isinstance(group.index, slice):  # own_output is a copy
                output.index_copy_(0, group.index, own_output)
        return output

    @property
    def _batch(self) -> PagedBatch:
        assert isinstance(self.batch_info, PagedBatch), "a forward pass without its batch"
        return self.batch_info
