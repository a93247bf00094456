"""The second half of LoRA: adds ``inner @ B^T`` to the base output, reading B from KV pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.addressing import chunk_elems, is_emulated, load_rows, rounded
from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK
from sglang_elora.kernels.launch_configs import ExpandConfig
from sglang_elora.kernels.routed_tiles import Tiles
from sglang_elora.kernels.stacked_module import StackedModule


@triton.jit(do_not_specialize=["num_splits", "num_tiles", "vocab_size", "module"])
def _lora_expand(
    inner,
    plane,
    output,
    tiles,
    addresses,
    rows,
    inner_split_stride,
    inner_stride,
    output_stride,
    num_splits,
    num_tiles,
    vocab_size,
    module,
    OUT_FEATURES: tl.constexpr,
    B_STRIDES: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SLOT_ELEMS: tl.constexpr,
    CHUNK: tl.constexpr,
    RECORD: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    RANK: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One program computes one block of output columns for a stride over the tiles.

    Grid: programs that share the tiles, blocks of columns over all parts. PLANES is 0 if ``plane``
    is the plane of a layer, in which the parts are adjacent. Otherwise the parts are those of the
    vocabulary, each in a layer, and ``plane`` has the addresses of so many planes per layer.
    """
    # The part that this block lies in, the part's first column, and the elements of B before it
    # per rank. Parts are adjacent in the output.
    block = tl.program_id(1)
    part = 0
    before = 0
    if PLANES:
        stride = B_STRIDES[0]
        blocks: tl.constexpr = (OUT_FEATURES[0] + BLOCK_N - 1) // BLOCK_N
        layer = block // blocks
        first_block = layer * blocks
        column = layer * OUT_FEATURES[0]
        out_features = tl.minimum(vocab_size - column, OUT_FEATURES[0])
        plane = tl.load(plane + layer * PLANES + PLANES - 1)
        plane = tl.multiple_of(plane.to(tl.pointer_type(output.dtype.element_ty)), ALIGNMENT)
    else:
        column = 0
        stride = 0
        out_features = 0
        first_block = 0
        next_block = 0
        next_column = 0
        next_before = 0
        for p in tl.static_range(len(OUT_FEATURES)):
            if block >= next_block:
                part = p
                first_block = next_block
                column = next_column
                before = next_before
                stride = B_STRIDES[p]
                out_features = OUT_FEATURES[p]
            next_block += (OUT_FEATURES[p] + BLOCK_N - 1) // BLOCK_N
            next_column += OUT_FEATURES[p]
            next_before += B_STRIDES[p]
    n0 = (block - first_block) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        record = tiles + tile * RECORD
        first = tl.load(record + FIRST)
        end = tl.load(record + END)
        rank = tl.load(record + RANK)
        offset = tl.load(record + OFFSETS + 2 * module + 1)
        table = tl.load(addresses + tile * (RECORD // 2)).to(tl.pointer_type(tl.int32))
        if (first < end) & (offset >= 0):
            m = first + tl.arange(0, BLOCK_M)
            mask_m = m < end
            row = tl.load(rows + m, mask=mask_m, other=0).to(tl.int64)
            product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                mask_r = r < rank
                inner_columns = inner + row[:, None] * inner_stride + (part * rank + r)[None, :]
                mask_inner = mask_m[:, None] & mask_r[None, :]
                inner_tile = tl.load(inner_columns, mask=mask_inner, other=0.0)
                for split in range(1, num_splits):
                    inner_tile += tl.load(
                        inner_columns + split * inner_split_stride, mask=mask_inner, other=0.0
                    )
                starts = offset + before * rank + r * stride
                b_tile = load_rows(
                    plane,
                    table,
                    starts,
                    mask_r,
                    n0,
                    out_features,
                    SLOT_ELEMS,
                    CHUNK,
                    BLOCK_R,
                    BLOCK_N,
                    EVEN_N,
                )
                # Rounded to the weights' dtype, as in SGLang's kernels.
                inner_tile = rounded(inner_tile, b_tile.dtype, EMULATED)
                if EMULATED:
                    inner_tile = inner_tile.to(tl.float32)
                    b_tile = b_tile.to(tl.float32)
                product = tl.dot(inner_tile, b_tile, product, input_precision="ieee")

            to = output + row[:, None] * output_stride + (column + n0 + n)[None, :]
            mask = mask_m[:, None]
            if not EVEN_N:
                mask = mask & (n0 + n < out_features)[None, :]
            base = tl.load(to, mask=mask, other=0.0)
            tl.store(to, rounded(base.to(tl.float32) + product, base.dtype, EMULATED), mask=mask)


def lora_expand(
    inner: torch.Tensor,
    plane: torch.Tensor,
    tables: Tiles,
    module: StackedModule,
    output: torch.Tensor,
    *,
    num_tiles: int,
    config: ExpandConfig,
) -> torch.Tensor:
    """Add ``inner @ B^T`` of each row's adapter to the output, part by part, in place.

    Args:
        inner: float32 ``[splits, T, width]`` of ``lora_shrink`` for the same module.
        plane: ``[slots, slot_elems]`` of the output's dtype: B's plane of this layer. B is stored
            transposed, per part ``rank`` rows of that part's outputs.
        tables: The batch, of T rows; rows without an adapter are not changed. For a module with
            experts, the batch's routes.
        module: The module that B belongs to.
        output: ``[T, sum of out_features]`` or wider, with adjacent columns.
        num_tiles: Tiles to launch programs for: those of the batch, or the most it can have.
        config: Launch configuration.

    Returns:
        ``output``.
    """
    assert output.dtype == plane.dtype and plane.is_contiguous()
    return launch(
        inner,
        plane,
        tables,
        module,
        output,
        parts=module.out_features,
        slot_elems=plane.shape[1],
        num_tiles=num_tiles,
        config=config,
    )


def launch(
    inner: torch.Tensor,
    plane: torch.Tensor,
    tables: Tiles,
    module: StackedModule,
    output: torch.Tensor,
    *,
    parts: Sequence[int],
    slot_elems: int,
    num_tiles: int,
    config: ExpandConfig,
    num_planes: int = 0,
    alignment: int = 16,
) -> torch.Tensor:
    """Launch the kernel, with arguments as of ``lora_expand`` but for these.

    Args:
        plane: The plane of a layer, or the addresses of all, int64 ``[layers, planes]``.
        parts: Columns of each part of the output.
        slot_elems: Elements of a slot.
        num_planes: Planes per layer in ``plane``; 0 if it is a plane.
        alignment: Of the planes of which there are addresses, in bytes.
    """
    num_splits, T, _ = inner.shape
    assert output.stride(1) == 1
    assert len(output) >= T and output.shape[1] >= sum(parts)
    if T == 0 or num_tiles == 0:
        return output
    num_blocks = sum(-(-columns // config.block_n) for columns in parts)
    _lora_expand[(min(num_tiles, config.max_tile_programs), num_blocks)](
        inner,
        plane,
        output,
        tables.tiles,
        tables.addresses,
        tables.rows,
        inner.stride(0),
        inner.stride(1),
        output.stride(0),
        num_splits,
        num_tiles,
        sum(parts),
        module.index,
        OUT_FEATURES=module.out_features,
        B_STRIDES=module.out_strides,
        PLANES=num_planes,
        ALIGNMENT=alignment,
        SLOT_ELEMS=slot_elems,
        CHUNK=chunk_elems(slot_elems, module.alignment, config.block_n),
        RECORD=tables.record_ints,
        FIRST=FIRST,
        END=END,
        RANK=RANK,
        OFFSETS=OFFSETS,
        BLOCK_M=tables.tile_rows,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        EVEN_N=all(columns % config.block_n == 0 for columns in parts),
        EMULATED=is_emulated(output.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output
