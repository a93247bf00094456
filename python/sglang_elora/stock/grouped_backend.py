"""SGLang's ``torch_native`` LoRA over its own slots, computed as ``elora_torch`` computes it.

SGLang's operators index with 0-dim tensors and call ``.item()`` for each segment, part, module and
layer, so that a decode step's LoRA takes about three times as long as with ``elora_torch``
(``benchmarks/serving/lora_cost.py``). This backend keeps segments as Python numbers and makes one
pair of matrix products per adapter. The slots, their loads and the arithmetic are SGLang's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from typing_extensions import override

from sglang_elora.srt.lora.grouped_rows import Index, expand_rows, rows_by_adapter, shrink_rows

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


Key = tuple[int, int, int]
"""(id of the buffer, slot, rank)"""
Part = tuple[int, int, torch.Tensor]
"""(first column, last column + 1, B^T) of one part, as ``expand_rows`` takes it."""


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The rows of the adapter in one slot."""

    slot: int
    rank: int
    scaling: float
    index: Index


@dataclass(slots=True)
class GroupedBatch:
    """One batch. SGLang sets and reads ``has_active_lora`` and ``is_prefill``."""

    groups: tuple[SlotRows, ...]
    num_rows: int
    has_active_lora: bool = False
    is_prefill: bool = False
    use_cuda_graph: bool = False


class GroupedLoRABackend(TorchNativeLoRABackend):
    """``torch_native`` with one group of rows per adapter. Eager only, without embeddings."""

    skip_inactive_lora_batches = True  # as elora_torch: base-only batches run without LoRA layers

    def __init__(self, max_loras_per_batch: int, device: torch.device, **options: Any) -> None:
        super().__init__(max_loras_per_batch, device, **options)
        # Views of SGLang's buffers, as elora_torch keeps its own. Each is with its buffer, so that
        # no other gets its id; a load changes what is in a buffer, and no view of it.
        self._kept_a: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept_b: dict[Key, tuple[torch.Tensor, Sequence[Part]]] = {}

    @override
    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        assert not use_cuda_graph, "the grouped backend runs eagerly"
        lengths = _lengths(forward_batch, len(weight_indices))
        rows, num_rows = rows_by_adapter(
            (
                (slot if lora_ranks[slot] else None, length)
                for slot, length in zip(weight_indices, lengths, strict=True)
            ),
            self.device,
        )
        self.batch_info = GroupedBatch(
            tuple(
                SlotRows(slot, lora_ranks[slot], float(scalings[slot]), index)
                for slot, index in rows.items()
            ),
            num_rows,
        )

    @override
    def run_lora_a_embedding(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("the grouped backend has no adapters on embed_tokens or lm_head")

    @override
    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: torch.Tensor, stack_num: int = 1, *_: Any, **options: Any
    ) -> torch.Tensor:
        if "pruned_batch_info" in options:
            raise NotImplementedError("the grouped backend has no adapters on lm_head")
        return self._shrink(x, weights, stack_num)

    @override
    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        return self._expand(x, weights, output_offset_cpu, base_output)

    @override
    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        max_qkv_out_dim: int,
        base_output: torch.Tensor | None = None,
        n_slices: int = 3,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        inner = self._shrink(x, qkv_lora_a, n_slices)
        return self._expand(inner, qkv_lora_b, output_offset_cpu, base_output)

    @override
    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        output_offset_cpu: torch.Tensor,
        base_output: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        inner = self._shrink(x, gate_up_lora_a, len(output_offset_cpu) - 1)
        return self._expand(inner, gate_up_lora_b, output_offset_cpu, base_output)

    def _shrink(self, x: torch.Tensor, weights: torch.Tensor, num_parts: int) -> torch.Tensor:
        """``x @ A^T * scaling``; ``weights`` is ``[slots, parts * largest rank, in_features]``."""
        batch = self._batch(x)
        width = max((num_parts * group.rank for group in batch.groups), default=0)
        output = x.new_zeros(len(x), width)
        for group in batch.groups:
            shrink_rows(x, group.index, self._a(weights, group, num_parts), group.scaling, output)
        return output

    def _expand(
        self,
        inner: torch.Tensor,
        weights: torch.Tensor,  # [slots, sum of out_features, largest rank]
        ends: torch.Tensor,  # int32 [parts + 1]: first column of each part, and the end
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        if output is None:
            output = inner.new_zeros(len(inner), weights.shape[1])
        for group in self._batch(inner).groups:
            parts = self._b(weights, group, ends)
            expand_rows(inner, group.index, parts, group.rank, output)
        return output

    def _a(self, weights: torch.Tensor, group: SlotRows, num_parts: int) -> torch.Tensor:
        key = (id(weights), group.slot, group.rank)
        kept = self._kept_a.get(key)
        if kept is None:
            kept = weights, weights[group.slot, : num_parts * group.rank]
            self._kept_a[key] = kept
        return kept[1]

    def _b(self, weights: torch.Tensor, group: SlotRows, ends: torch.Tensor) -> Sequence[Part]:
        key = (id(weights), group.slot, group.rank)
        kept = self._kept_b.get(key)
        if kept is None:
            columns: Sequence[int] = ends.tolist()
            b = weights[group.slot, :, : group.rank].T
            kept = weights, [(start, end, b[:, start:end]) for start, end in pairwise(columns)]
            self._kept_b[key] = kept
        return kept[1]

    def _batch(self, x: torch.Tensor) -> GroupedBatch:
        batch = self.batch_info
        assert isinstance(batch, GroupedBatch), "a forward pass without its batch"
        assert len(x) >= batch.num_rows, f"{len(x)} rows in a batch of {batch.num_rows}"
        return batch


def _lengths(forward_batch: ForwardBatch, num_requests: int) -> Sequence[int]:
    """Rows of each request: one in a decode step, its new tokens in a prefill."""
    if forward_batch.forward_mode.is_decode():
        return (1,) * num_requests
    assert forward_batch.forward_mode.is_extend(), forward_batch.forward_mode
    lengths: Sequence[int] = list(map(int, forward_batch.extend_seq_lens_cpu))
    return lengths
