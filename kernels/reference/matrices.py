"""Matrices of an adapter as one address space over scattered slots."""

from __future__ import annotations

import torch


def read_matrix(
    plane: torch.Tensor, table: torch.Tensor, offset: int, num_rows: int, stride: int
) -> torch.Tensor:
    """``[num_rows, stride]`` in float32, element by element.

    Args:
        plane: ``[slots, slot_elems]``.
        table: int32 ``[num_slots]``.
        offset: Of the first element in the address space.
    """
    slot_elems = plane.shape[1]
    addresses = offset + torch.arange(num_rows * stride, device=plane.device)
    slots = table.long()[addresses // slot_elems]
    return plane[slots, addresses % slot_elems].view(num_rows, stride).float()
