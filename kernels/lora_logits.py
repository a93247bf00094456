"""The second half of LoRA for the output layer: ``lora_expand`` with parts of B in all layers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.addressing import chunk_elems, is_emulated
from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK, BatchTables
from sglang_elora.kernels.launch_configs import ExpandConfig
from sglang_elora.kernels.lora_expand import add_product
from sglang_elora.kernels.page_copy import PoolPlanes
from sglang_elora.kernels.stacked_module import StackedModule


@triton.jit(do_not_specialize=["num_splits", "num_tiles", "vocab_size"])
def _lora_logits(
    inner,
    planes,
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
    MODULE: tl.constexpr,
    PART_SIZE: tl.constexpr,
    B_STRIDE: tl.constexpr,
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
    """One program computes one block of a layer's columns for a stride over the tiles.

    Grid: programs that share the tiles, blocks of columns over all layers' parts.
    """
    BLOCKS: tl.constexpr = (PART_SIZE + BLOCK_N - 1) // BLOCK_N
    layer = tl.program_id(1) // BLOCKS
    n0 = tl.program_id(1) % BLOCKS * BLOCK_N
    out_features = tl.minimum(vocab_size - layer * PART_SIZE, PART_SIZE)
    plane = tl.load(planes + layer * PLANES + PLANES - 1)
    plane = tl.multiple_of(plane.to(tl.pointer_type(output.dtype.element_ty)), ALIGNMENT)
    if n0 < out_features:
        add_product(
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
            0,
            0,
            B_STRIDE,
            layer * PART_SIZE,
            n0,
            out_features,
            MODULE,
            SLOT_ELEMS,
            CHUNK,
            RECORD,
            FIRST,
            END,
            RANK,
            OFFSETS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            EVEN_N,
            EMULATED,
        )


def lora_logits(
    inner: torch.Tensor,
    pool: PoolPlanes,
    tables: BatchTables,
    module: StackedModule,
    output: torch.Tensor,
    *,
    vocab_size: int,
    num_tiles: int,
    config: ExpandConfig,
) -> torch.Tensor:
    """Add ``inner @ B^T`` of each row's adapter to the logits, in place. One launch.

    Args:
        inner: float32 ``[splits, T, width]`` of ``lora_shrink`` for the same module.
        pool: The pool's planes, in whose last B is.
        tables: The batch; rows without an adapter are not changed.
        module: The output layer; its ``out_features`` are the tokens of a layer's part.
        output: ``[T, vocab_size]`` or wider, of the weights' dtype, with adjacent columns.
        vocab_size: Tokens that B has rows for.
        num_tiles: Tiles to launch programs for: those of the batch, or the most it can have.
        config: Launch configuration.

    Returns:
        ``output``.
    """
    num_splits, T, _ = inner.shape
    (part_size,) = module.out_features
    num_parts, item_bytes = -(-vocab_size // part_size), output.dtype.itemsize
    slot_elems = pool.slot_bytes // item_bytes
    assert len(output) >= T and output.shape[1] >= vocab_size and output.stride(1) == 1
    assert num_parts <= len(pool.addresses), (num_parts, len(pool.addresses))
    if T == 0 or num_tiles == 0:
        return output
    num_blocks = num_parts * -(-part_size // config.block_n)
    _lora_logits[(min(num_tiles, config.max_tile_programs), num_blocks)](
        inner,
        pool.addresses,
        output,
        tables.tiles,
        tables.addresses,
        tables.rows,
        inner.stride(0),
        inner.stride(1),
        output.stride(0),
        num_splits,
        num_tiles,
        vocab_size,
        MODULE=module.index,
        PART_SIZE=part_size,
        B_STRIDE=module.out_strides[0],
        PLANES=pool.addresses.shape[1],
        ALIGNMENT=pool.alignment,
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
        EVEN_N=math.gcd(part_size, vocab_size) % config.block_n == 0,
        EMULATED=is_emulated(output.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output
