"""Address translation from an adapter's address space to slots of the KV pool.

One plane of one layer of the pool is ``[slots, slot_elems]`` in the weights' dtype. Element ``o``
of an adapter's address space lies in slot ``table[o // slot_elems]`` at ``o % slot_elems``. Kernels
read chunks, runs of elements within one slot, with one lookup in the table per chunk.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1, set before the import)."""


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether kernels must work around the interpreter's incomplete support of this dtype."""
    return INTERPRETED and dtype == torch.bfloat16


def chunk_elems(slot_elems: int, alignment: int, block: int) -> int:
    """The largest chunk, in elements, such that chunks at multiples of it never cross a slot.

    Args:
        slot_elems: Elements of a slot.
        alignment: Common divisor of all offsets and strides of the address space, in elements.
        block: Elements of a row that a kernel reads at once, a power of two.

    Returns:
        The largest power of two that divides all of them.
    """
    common = math.gcd(slot_elems, alignment, block)
    return common & -common


@triton.jit
def rounded(value, dtype: tl.constexpr, EMULATED: tl.constexpr):
    """Round float32 to the weights' dtype, to nearest, ties to even.

    EMULATED: bfloat16 under the interpreter, which truncates instead.
    """
    if EMULATED:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def load_rows(
    plane,
    table,
    starts,
    mask_rows,
    column,
    num_columns,
    SLOT_ELEMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
):
    """Load a tile ``[BLOCK_ROWS, BLOCK_COLUMNS]`` of a matrix from ``column`` on; zero where
    masked.

    Args:
        plane: ``[slots, SLOT_ELEMS]``, contiguous.
        table: int32 ``[num_slots]``, the adapter's slots.
        starts: int32 ``[BLOCK_ROWS]``, addresses of the rows; multiples of CHUNK.
        mask_rows: int1 ``[BLOCK_ROWS]``.
        column: First column, a multiple of CHUNK.
        num_columns: Columns of the matrix; columns beyond are zero.
    """
    CHUNKS: tl.constexpr = BLOCK_COLUMNS // CHUNK
    chunks = column + tl.arange(0, CHUNKS) * CHUNK
    addresses = tl.multiple_of(starts, CHUNK)[:, None] + chunks[None, :]
    mask = mask_rows[:, None] & tl.full((1, CHUNKS), True, tl.int1)
    if not EVEN_COLUMNS:
        mask = mask & (chunks[None, :] < num_columns)
    slots = tl.load(table + addresses // SLOT_ELEMS, mask=mask, other=0)
    begins = slots.to(tl.int64) * SLOT_ELEMS + addresses % SLOT_ELEMS
    begins = tl.multiple_of(begins, [CHUNK, CHUNK])
    within = tl.arange(0, CHUNK)
    elements = begins[:, :, None] + within[None, None, :]
    mask_elements = tl.broadcast_to(mask[:, :, None], (BLOCK_ROWS, CHUNKS, CHUNK))
    if not EVEN_COLUMNS:
        mask_elements = mask_elements & (
            chunks[None, :, None] + within[None, None, :] < num_columns
        )
    tile = tl.load(plane + elements, mask=mask_elements, other=0.0)
    return tl.reshape(tile, (BLOCK_ROWS, BLOCK_COLUMNS))
