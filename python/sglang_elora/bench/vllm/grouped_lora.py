"""Plugin of vLLM (group ``vllm.general_plugins``) that replaces its LoRA computation on CPUs.

The file is copied next to a generated distribution and imported by vLLM's processes, in vLLM's
environment: it imports torch and vLLM only.

vLLM 0.32 on a CPU gathers the padded weights of a row's adapter for each row of a batch. A row of
the base model has index -1 there, so it gets the weights of the last slot. Here the rows of a batch
are grouped by adapter: two matrix products for each adapter and projection, with the adapter's own
rank, and none for rows of the base model. Loads, slots, scheduler and cache remain vLLM's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch

_GROUPS = "grouped_lora_groups"  # attributes added to vLLM's PunicaWrapperCPU
_RANKS = "grouped_lora_ranks"

Rows: TypeAlias = "slice | torch.Tensor"
"""Rows of one adapter in a batch: a slice if they are adjacent, otherwise their numbers."""


def grouped() -> None:
    """Replace the functions. vLLM calls this in each of its processes."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    update_metadata = PunicaWrapperCPU.update_metadata
    activate_adapter = LoRAModelManager.activate_adapter

    def update(self: Any, *arguments: Any, **options: Any) -> None:
        update_metadata(self, *arguments, **options)
        indices = self._lora_indices_per_batch[: self.batch_size].tolist()
        lengths = self._seq_lengths[: self.batch_size].tolist()
        setattr(self, _GROUPS, groups_of(zip(indices, lengths, strict=True)))

    def activate(self: Any, lora_id: int) -> bool:
        activated: bool = activate_adapter(self, lora_id)
        slot = self.lora_index_to_id.index(lora_id)
        for wrapper in self.punica_wrapper_mapping.values():
            ranks = getattr(wrapper, _RANKS, {})
            ranks[slot] = self._registered_adapters[lora_id].rank
            setattr(wrapper, _RANKS, ranks)
        return activated

    PunicaWrapperCPU.update_metadata = update
    PunicaWrapperCPU.add_lora_linear = _add_lora_linear
    LoRAModelManager.activate_adapter = activate


def groups_of(runs: Iterable[tuple[int, int]]) -> list[tuple[int, Rows]]:
    """The rows of each adapter slot, from (slot, number of adjacent rows); -1 is no adapter."""
    spans: dict[int, list[tuple[int, int]]] = {}
    begin = 0
    for slot, length in runs:
        if slot >= 0:
            spans.setdefault(slot, []).append((begin, begin + length))
        begin += length
    return [(slot, _rows(found)) for slot, found in spans.items()]


def _rows(spans: Sequence[tuple[int, int]]) -> Rows:
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.tensor([*itertools.chain.from_iterable(range(*span) for span in spans)])


def _add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: Sequence[torch.Tensor],  # each (slots, 1, largest rank, inputs)
    lora_b_stacked: Sequence[torch.Tensor],  # each (slots, 1, outputs, largest rank)
    scale: float,
    output_slices: Sequence[int],
    *,
    add_inputs: bool = True,
    **_: Any,
) -> None:
    """Add each adapter's output to its rows of ``y``, which is changed in place."""
    assert add_inputs, "vLLM uses False only for its second CUDA stream"
    inputs, outputs = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    ranks = getattr(self, _RANKS, {})
    for slot, rows in getattr(self, _GROUPS, ()):
        add_adapter(
            outputs,
            inputs,
            rows,
            [a[slot, 0, : ranks[slot]] for a in lora_a_stacked],
            [b[slot, 0, :, : ranks[slot]] for b in lora_b_stacked],
            scale,
        )


def add_adapter(
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    rows: Rows,
    a_matrices: Sequence[torch.Tensor],  # each (rank, inputs)
    b_matrices: Sequence[torch.Tensor],  # each (outputs of its slice, rank)
    scale: float,
) -> None:
    """Add ``scale * B @ A @ x`` of one adapter to its rows; slices of the output are adjacent."""
    mine = inputs[rows] if isinstance(rows, slice) else inputs.index_select(0, rows)
    begin = 0
    for a, b in zip(a_matrices, b_matrices, strict=True):
        target = outputs.narrow(1, begin, b.shape[0])
        low = torch.mm(mine, a.t())
        if isinstance(rows, slice):
            target[rows].addmm_(low, b.t(), alpha=scale)
        else:
            target.index_add_(0, rows, torch.mm(low, b.t()), alpha=scale)
        begin += b.shape[0]
