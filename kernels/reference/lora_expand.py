"""Reference of ``kernels/lora_expand.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_elora.kernels.reference.matrices import read_matrix
from sglang_elora.kernels.stacked_module import StackedModule


def lora_expand(
    inner: torch.Tensor,
    plane: torch.Tensor,
    rows: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    ranks: Sequence[int],
    offsets: Sequence[int],
    module: StackedModule,
    output: torch.Tensor,
) -> torch.Tensor:
    """Add ``inner @ B^T`` to ``output`` (float32 ``[T, out]``), adapter by adapter, in place.

    Args:
        inner: float32 ``[T, width]``.
        rows: Per adapter, the int64 indices of its rows.
        offsets: Per adapter, the address of B in its address space; negative if it has no B.
    """
    for own, table, rank, offset in zip(rows, tables, ranks, offsets, strict=True):
        if offset < 0 or not len(own):
            continue
        column = 0
        for part, (out, stride) in enumerate(
            zip(module.out_features, module.out_strides, strict=True)
        ):
            b = read_matrix(plane, table, offset, rank, stride)[:, :out]
            output[own, column : column + out] += inner[own, part * rank : (part + 1) * rank] @ b
            column += out
            offset += rank * stride
    return output
