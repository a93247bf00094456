"""Reads matrices from an adapter's address space, which maps to scattered slots."""

from __future__ import annotations

import torch


def read_matrix(
    plane: torch.Tensor, table: torch.Tensor, offset: int, num_rows: int, stride: int
) -> torch.Tensor:
    """The matrix ``[num_rows, stride]`` at ``offset``, in float32, read element by element.

    Args:
        plane: ``[slots, slot_elems]``.
        table: int32 ``[num_slots]``, the adapter's slots.
        offset: Address of the first element.
    """
    slot_elems = plane.shape[1]
    addresses = offset + torch.arange(num_rows * stride, device=plane.device)
    slots = table.long()[addresses // slot_elems]
    return plane[slots, addresses % slot_elems].view(num_rows, stride).float()
