"""Reference of ``kernels/lora_shrink.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_elora.kernels.reference.matrices import read_matrix
from sglang_elora.kernels.stacked_module import StackedModule


def lora_shrink(
    x: torch.Tensor,
    plane: torch.Tensor,
    rows: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    ranks: Sequence[int],
    scalings: Sequence[float],
    offsets: Sequence[int],
    module: StackedModule,
    inner: torch.Tensor,
    rows_per_input: int = 1,
) -> torch.Tensor:
    """Write ``x @ A^T * scaling`` to ``inner`` (float32 ``[T, width]``), adapter by adapter.

    Args:
        x: ``[T / rows_per_input, in_features]``; row r of ``inner`` is computed from row
            ``r // rows_per_input``.
        rows: Per adapter, the int64 indices of its rows of ``inner``.
        offsets: Per adapter, the address of A in its address space; negative if it has no A.
    """
    for own, table, rank, scaling, offset in zip(
        rows, tables, ranks, scalings, offsets, strict=True
    ):
        if offset >= 0 and len(own):
            num_rows = len(module.out_features) * rank
            a = read_matrix(plane, table, offset, num_rows, module.in_stride)
            inputs = x[own // rows_per_input].float()
            inner[own, :num_rows] = inputs @ a[:, : module.in_features].T * scaling
    return inner
