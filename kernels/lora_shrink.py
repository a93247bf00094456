"""The first half of LoRA: ``x @ A^T * scaling`` for rows of many adapters, with A in KV pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.addressing import chunk_elems, is_emulated, load_rows
from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK, SCALING
from sglang_elora.kernels.launch_configs import ShrinkConfig
from sglang_elora.kernels.routed_tiles import Tiles
from sglang_elora.kernels.stacked_module import StackedModule


@triton.jit(do_not_specialize=["num_splits", "num_tiles", "module"])
def _lora_shrink(
    x,
    plane,
    inner,
    tiles,
    addresses,
    rows,
    x_stride,
    inner_split_stride,
    inner_stride,
    num_splits,
    num_tiles,
    module,
    PARTS: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    ROWS_PER_INPUT: tl.constexpr,
    A_STRIDE: tl.constexpr,
    SLOT_ELEMS: tl.constexpr,
    CHUNK: tl.constexpr,
    RECORD: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    RANK: tl.constexpr,
    SCALING: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One program computes one split of the columns, for a stride over the tiles and A's rows.

    Grid: programs that share the tiles, lanes that share A's rows, splits of the columns.
    """
    EVEN_K: tl.constexpr = IN_FEATURES % BLOCK_K == 0
    lane = tl.program_id(1)
    split = tl.program_id(2)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        record = tiles + tile * RECORD
        first = tl.load(record + FIRST)
        end = tl.load(record + END)
        rank = tl.load(record + RANK)
        offset = tl.load(record + OFFSETS + 2 * module)
        scaling = tl.load(record + SCALING).to(tl.float32, bitcast=True)
        table = tl.load(addresses + tile * (RECORD // 2)).to(tl.pointer_type(tl.int32))
        if (first < end) & (offset >= 0):
            m = first + tl.arange(0, BLOCK_M)
            mask_m = m < end
            row = tl.load(rows + m, mask=mask_m, other=0).to(tl.int64)
            x_row = row if ROWS_PER_INPUT == 1 else row // ROWS_PER_INPUT
            k = tl.arange(0, BLOCK_K)
            for n0 in range(lane * BLOCK_N, PARTS * rank, tl.num_programs(1) * BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                mask_n = n < PARTS * rank
                product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for k0 in range(split * BLOCK_K, IN_FEATURES, num_splits * BLOCK_K):
                    mask_x = mask_m[:, None]
                    if not EVEN_K:
                        mask_x = mask_x & (k0 + k[None, :] < IN_FEATURES)
                    x_tile = tl.load(
                        x + x_row[:, None] * x_stride + k0 + k[None, :], mask=mask_x, other=0.0
                    )
                    a_tile = load_rows(
                        plane,
                        table,
                        offset + n * A_STRIDE,
                        mask_n,
                        k0,
                        IN_FEATURES,
                        SLOT_ELEMS,
                        CHUNK,
                        BLOCK_N,
                        BLOCK_K,
                        EVEN_K,
                    )
                    if EMULATED:
                        x_tile = x_tile.to(tl.float32)
                        a_tile = a_tile.to(tl.float32)
                    product = tl.dot(x_tile, tl.trans(a_tile), product, input_precision="ieee")
                tl.store(
                    inner + split * inner_split_stride + row[:, None] * inner_stride + n[None, :],
                    product * scaling,
                    mask=mask_m[:, None] & mask_n[None, :],
                )


def lora_shrink(
    x: torch.Tensor,
    plane: torch.Tensor,
    tables: Tiles,
    module: StackedModule,
    *,
    width: int,
    num_tiles: int,
    config: ShrinkConfig,
    rows_per_input: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ A^T * scaling`` of each row's adapter, for all parts of a stacked module at once.

    Args:
        x: ``[T / rows_per_input, in_features]``, with adjacent columns.
        plane: ``[slots, slot_elems]`` of x's dtype: A's plane of this layer.
        tables: The batch, of T rows; rows without an adapter are not computed. For a module with
            experts, the batch's routes.
        module: The module that A belongs to.
        width: Columns of the result, at least ``parts * rank`` of any adapter in the batch.
        num_tiles: Tiles to launch programs for: those of the batch, or the most it can have.
        config: Launch configuration.
        rows_per_input: Adjacent rows of the result that are computed from the same row of ``x``:
            row r is computed from row ``r // rows_per_input``.
        out: Memory for the result; None: new memory.

    Returns:
        float32 ``[splits, T, width]``, whose sum over the first dimension is the result. Only the
        first ``parts * rank`` columns of rows with an adapter are written.
    """
    num_inputs, in_features = x.shape
    T = num_inputs * rows_per_input
    assert in_features == module.in_features, (in_features, module)
    assert x.dtype == plane.dtype and x.stride(1) == 1 and plane.is_contiguous()
    shape = (config.num_splits, T, width)
    inner = torch.empty(shape, dtype=torch.float32, device=x.device) if out is None else out
    assert inner.shape == shape and inner.is_contiguous()
    if T == 0 or num_tiles == 0:
        return inner
    slot_elems = plane.shape[1]
    _lora_shrink[(min(num_tiles, config.max_tile_programs), config.lanes, config.num_splits)](
        x,
        plane,
        inner,
        tables.tiles,
        tables.addresses,
        tables.rows,
        x.stride(0),
        inner.stride(0),
        inner.stride(1),
        config.num_splits,
        num_tiles,
        module.index,
        PARTS=len(module.out_features),
        IN_FEATURES=in_features,
        ROWS_PER_INPUT=rows_per_input,
        A_STRIDE=module.in_stride,
        SLOT_ELEMS=slot_elems,
        CHUNK=chunk_elems(slot_elems, module.alignment, config.block_k),
        RECORD=tables.record_ints,
        FIRST=FIRST,
        END=END,
        RANK=RANK,
        SCALING=SCALING,
        OFFSETS=OFFSETS,
        BLOCK_M=tables.tile_rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EMULATED=is_emulated(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return inner
