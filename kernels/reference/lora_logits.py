"""Reference of ``kernels/lora_logits.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_elora.kernels.reference.lora_expand import lora_expand
from sglang_elora.kernels.stacked_module import StackedModule


def lora_logits(
    inner: torch.Tensor,
    planes: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    ranks: Sequence[int],
    offsets: Sequence[int],
    module: StackedModule,
    vocab_size: int,
    output: torch.Tensor,
) -> torch.Tensor:
    """Add ``inner @ B^T`` to ``output`` (float32 ``[T, vocab_size]``), layer by layer, in place.

    Args:
        inner: float32 ``[T, width]``.
        planes: Per layer ``[slots, slot_elems]``: the plane of B, which holds a part of its rows.
        rows: Per adapter, the int64 indices of its rows.
        offsets: Per adapter, the address of B in its address space; negative if it has no B.
    """
    (part_size,) = module.out_features
    for layer, plane in enumerate(planes):
        start, end = layer * part_size, min((layer + 1) * part_size, vocab_size)
        if start < end:
            part = torch.zeros(len(output), part_size, device=output.device)
            lora_expand(inner, plane, rows, tables, ranks, offsets, module, part)
            output[:, start:end] += part[:, : end - start]
    return output
