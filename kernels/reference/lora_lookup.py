"""Reference of ``kernels/lora_lookup.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_elora.kernels.reference.matrices import read_matrix
from sglang_elora.kernels.stacked_module import StackedModule


def lora_lookup(
    tokens: torch.Tensor,
    planes: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    ranks: Sequence[int],
    scalings: Sequence[float],
    offsets: Sequence[int],
    module: StackedModule,
    vocab_size: int,
    inner: torch.Tensor,
) -> torch.Tensor:
    """Write ``A[:, token] * scaling`` to ``inner`` (float32 ``[T, width]``), adapter by adapter.

    Args:
        tokens: int64 ``[T]``; those outside the vocabulary give zeros.
        planes: Per layer ``[slots, slot_elems]``: the plane of A, which holds a part of its
            columns.
        rows: Per adapter, the int64 indices of its rows of ``tokens``.
        offsets: Per adapter, the address of A in its address space; negative if it has no A.
    """
    for own, table, rank, scaling, offset in zip(
        rows, tables, ranks, scalings, offsets, strict=True
    ):
        if offset >= 0 and len(own):
            parts = [read_matrix(plane, table, offset, rank, module.in_stride) for plane in planes]
            a = torch.cat([part[:, : module.in_features] for part in parts], dim=1)
            known = (tokens[own] >= 0) & (tokens[own] < vocab_size)
            columns = a[:, tokens[own].clamp(0, vocab_size - 1)].T
            inner[own, :rank] = columns * known[:, None] * scaling
    return inner
