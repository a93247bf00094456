"""The first half of LoRA for an embedding: a column of A per token, with A in KV pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK, SCALING, BatchTables
from sglang_elora.kernels.page_copy import PoolPlanes
from sglang_elora.kernels.stacked_module import StackedModule

_WEIGHTS: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_BLOCK_N = 16  # rows of A that a program reads at once
_MAX_TILE_PROGRAMS = 1024  # with more tiles, a program looks up several


@triton.jit(
    do_not_specialize=["num_tiles", "vocab_size"], do_not_specialize_on_alignment=["tokens"]
)
def _lora_lookup(
    tokens,
    planes,
    inner,
    tiles,
    addresses,
    rows,
    inner_stride,
    num_tiles,
    vocab_size,
    WEIGHTS: tl.constexpr,
    MODULE: tl.constexpr,
    PART_SIZE: tl.constexpr,
    A_STRIDE: tl.constexpr,
    SLOT_ELEMS: tl.constexpr,
    PLANES: tl.constexpr,
    RECORD: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    RANK: tl.constexpr,
    SCALING: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program looks up the tokens of one tile, for a stride over the tiles."""
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        record = tiles + tile * RECORD
        first = tl.load(record + FIRST)
        end = tl.load(record + END)
        rank = tl.load(record + RANK)
        offset = tl.load(record + OFFSETS + 2 * MODULE)
        scaling = tl.load(record + SCALING).to(tl.float32, bitcast=True)
        table = tl.load(addresses + tile * (RECORD // 2)).to(tl.pointer_type(tl.int32))
        if (first < end) & (offset >= 0):
            m = first + tl.arange(0, BLOCK_M)
            mask_m = m < end
            row = tl.load(rows + m, mask=mask_m, other=0).to(tl.int64)
            token = tl.load(tokens + row, mask=mask_m, other=-1)
            known = (token >= 0) & (token < vocab_size)
            token = tl.where(known, token, 0)
            plane = tl.load(planes + token // PART_SIZE * PLANES).to(tl.pointer_type(WEIGHTS))
            column = (token % PART_SIZE).to(tl.int32)
            for n0 in range(0, rank, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                mask_n = n < rank
                mask = known[:, None] & mask_n[None, :]
                address = offset + n[None, :] * A_STRIDE + column[:, None]
                slot = tl.load(table + address // SLOT_ELEMS, mask=mask, other=0)
                element = slot.to(tl.int64) * SLOT_ELEMS + address % SLOT_ELEMS
                a = tl.load(plane[:, None] + element, mask=mask, other=0.0)
                tl.store(
                    inner + row[:, None] * inner_stride + n[None, :],
                    a.to(tl.float32) * scaling,
                    mask=mask_m[:, None] & mask_n[None, :],
                )


def lora_lookup(
    tokens: torch.Tensor,
    pool: PoolPlanes,
    tables: BatchTables,
    module: StackedModule,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    width: int,
    num_tiles: int,
) -> torch.Tensor:
    """``A[:, token] * scaling`` of each row's adapter, with a part of A's columns in each layer.

    Args:
        tokens: int64 ``[T]``, contiguous; those outside the vocabulary give zeros.
        pool: The pool's planes, in whose first A is.
        tables: The batch; rows without an adapter are not computed.
        module: The embedding; its ``in_features`` are the tokens of a layer's part.
        vocab_size: Tokens that A has columns for.
        dtype: Dtype of the weights.
        width: Columns of the result, at least the rank of any adapter in the batch.
        num_tiles: Tiles to launch programs for: those of the batch, or the most it can have.

    Returns:
        float32 ``[1, T, width]``, as of ``lora_shrink`` with one split. Only the first ``rank``
        columns of rows with an adapter are written.
    """
    assert tokens.is_contiguous()
    room = len(pool.addresses) * module.in_features
    assert vocab_size <= room, (vocab_size, room)
    inner = torch.empty((1, len(tokens), width), dtype=torch.float32, device=tokens.device)
    if len(tokens) == 0 or num_tiles == 0:
        return inner
    _lora_lookup[(min(num_tiles, _MAX_TILE_PROGRAMS),)](
        tokens,
        pool.addresses,
        inner,
        tables.tiles,
        tables.addresses,
        tables.rows,
        inner.stride(1),
        num_tiles,
        vocab_size,
        WEIGHTS=_WEIGHTS[dtype],
        MODULE=module.index,
        PART_SIZE=module.in_features,
        A_STRIDE=module.in_stride,
        SLOT_ELEMS=pool.slot_bytes // dtype.itemsize,
        PLANES=pool.addresses.shape[1],
        RECORD=tables.record_ints,
        FIRST=FIRST,
        END=END,
        RANK=RANK,
        SCALING=SCALING,
        OFFSETS=OFFSETS,
        BLOCK_M=tables.tile_rows,
        BLOCK_N=_BLOCK_N,
    )
    return inner
