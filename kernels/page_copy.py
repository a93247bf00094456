"""Copies between contiguous memory and slots of the KV pool, all layers and planes in one
launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.addressing import chunk_elems

JOB_INTS = 3  # int64 before those of the planes: addresses of memory and table, words of a layer
_BLOCK_WORDS = 2048  # words copied by one program


@dataclass(frozen=True, slots=True)
class PoolPlanes:
    """The addresses of the pool's planes, for ``page_copy``.

    Args:
        addresses: int64 ``[layers, planes]`` on the device: addresses of tensors
            ``[slots, slot_bytes]``.
        slot_bytes: Bytes of a slot in one plane of one layer.
        alignment: Common divisor of all slots' addresses, in bytes, at most 16.
    """

    addresses: torch.Tensor
    slot_bytes: int
    alignment: int

    @classmethod
    def of(cls, planes: Sequence[Sequence[torch.Tensor]]) -> PoolPlanes:
        """Build from ``planes[plane][layer]``, contiguous tensors ``[slots, ...]`` of one slot
        size."""
        first = planes[0][0]
        addresses = [
            [tensor.data_ptr() for tensor in layers] for layers in zip(*planes, strict=True)
        ]
        slot_bytes = first[0].nbytes
        alignment = math.gcd(16, slot_bytes, *(begin for layer in addresses for begin in layer))
        return cls(torch.tensor(addresses, device=first.device), slot_bytes, alignment)


@dataclass(frozen=True, slots=True)
class Contiguous:
    """One adapter or one run of KV in memory outside the pool, and its slots in the pool.

    Args:
        memory: uint8 ``[layers, sum of plane_bytes]``: each layer holds its planes one after the
            other. On the device, or in pinned host memory.
        table: int32 ``[num_slots]`` on the device: slots in the order of the addresses.
        plane_bytes: Bytes used of each plane, at most those of the slots.
    """

    memory: torch.Tensor
    table: torch.Tensor
    plane_bytes: tuple[int, ...]

    def check(self, pool: PoolPlanes, num_layers: int) -> None:
        """Check the sizes.

        Raises:
            ValueError: Sizes do not match, so that the copy would access other memory.
        """
        expected = (num_layers, sum(self.plane_bytes))
        if self.memory.dtype != torch.uint8 or tuple(self.memory.shape) != expected:
            raise ValueError(
                f"memory is {self.memory.dtype} {tuple(self.memory.shape)}, not uint8 {expected}"
            )
        if self.memory.stride(1) != 1:
            raise ValueError("the bytes of a layer are not adjacent")
        if self.table.dtype != torch.int32 or not self.table.is_contiguous():
            raise ValueError(f"the table is {self.table.dtype}, not contiguous int32")
        num_planes, room = pool.addresses.shape[1], len(self.table) * pool.slot_bytes
        if len(self.plane_bytes) != num_planes or max(self.plane_bytes) > room:
            raise ValueError(
                f"planes of {self.plane_bytes} bytes do not fit {len(self.table)} slots of "
                f"{pool.slot_bytes} bytes in {num_planes} planes"
            )


@triton.jit(do_not_specialize=["first_layer"])
def _page_copy(
    addresses,
    jobs,
    first_layer,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    JOB: tl.constexpr,
    HEAD: tl.constexpr,
    PLANES: tl.constexpr,
    SLOT_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_POOL: tl.constexpr,
):
    """One program copies one block of words. Grid: blocks of a plane, layers * planes, copies."""
    layer = tl.program_id(1) // PLANES
    plane = tl.program_id(1) % PLANES
    job = jobs + tl.program_id(2) * JOB
    # NOTE: without these hints Triton does not vectorise the copy.
    num_words = tl.multiple_of(tl.load(job + HEAD + 2 * plane), ALIGNMENT // WORD_BYTES)
    begin = tl.program_id(0) * BLOCK
    if begin < num_words:
        memory = tl.load(job).to(tl.pointer_type(WORD))
        table = tl.load(job + 1).to(tl.pointer_type(tl.int32))
        memory += layer.to(tl.int64) * tl.load(job + 2) + tl.load(job + HEAD + 2 * plane + 1)
        memory = tl.multiple_of(memory, ALIGNMENT)
        pool = tl.load(addresses + (first_layer + layer) * PLANES + plane)
        pool = tl.multiple_of(pool.to(tl.pointer_type(WORD)), ALIGNMENT)

        chunks = begin + tl.arange(0, BLOCK // CHUNK) * CHUNK
        slots = tl.load(table + chunks // SLOT_WORDS, mask=chunks < num_words, other=0)
        begins = slots.to(tl.int64) * SLOT_WORDS + chunks % SLOT_WORDS
        begins = tl.multiple_of(begins, CHUNK)
        within = tl.arange(0, CHUNK)
        in_pool = pool + begins[:, None] + within[None, :]
        in_memory = memory + chunks[:, None] + within[None, :]
        mask = chunks[:, None] + within[None, :] < num_words
        if TO_POOL:
            tl.store(in_pool, tl.load(in_memory, mask=mask), mask=mask)
        else:
            tl.store(in_memory, tl.load(in_pool, mask=mask), mask=mask)


def page_copy(
    pool: PoolPlanes,
    copies: Sequence[Contiguous],
    *,
    to_pool: bool,
    first_layer: int = 0,
    jobs: torch.Tensor | None = None,
) -> None:
    """Copy adapters or KV into their slots, or out of them. One launch, on the current stream.

    The unused end of a copy's last slot and all other slots keep their content.

    Args:
        pool: The pool.
        copies: The copies; all have the same number of layers.
        to_pool: True: into the slots; False: out of them.
        first_layer: Layer of the pool that corresponds to layer 0 of the memory.
        jobs: int64 ``[copies, job_ints(planes)]`` on the device: work memory for the kernel's job
            list, overwritten on the current stream. None: new memory.

    Raises:
        ValueError: Sizes do not match.
    """
    if not copies or len(copies[0].memory) == 0:
        return
    num_layers, num_planes = len(copies[0].memory), pool.addresses.shape[1]
    if not 0 <= first_layer <= first_layer + num_layers <= len(pool.addresses):
        raise ValueError(
            f"layers {first_layer} to {first_layer + num_layers} of {len(pool.addresses)}"
        )
    for copy in copies:
        copy.check(pool, num_layers)
    alignment = _alignment(pool, copies)
    word = min(alignment, 4)
    described = torch.tensor(
        [_job(copy, word) for copy in copies], pin_memory=pool.addresses.is_cuda
    )
    if jobs is None:
        jobs = torch.empty_like(described, device=pool.addresses.device)
    jobs.copy_(described, non_blocking=True)
    longest = max(max(copy.plane_bytes) for copy in copies) // word
    slot_words = pool.slot_bytes // word
    num_blocks = max(1, triton.cdiv(longest, _BLOCK_WORDS))
    _page_copy[(num_blocks, num_layers * num_planes, len(copies))](
        pool.addresses,
        jobs,
        first_layer,
        WORD={4: tl.int32, 2: tl.int16, 1: tl.int8}[word],
        WORD_BYTES=word,
        ALIGNMENT=alignment,
        JOB=jobs.shape[1],
        HEAD=JOB_INTS,
        PLANES=num_planes,
        SLOT_WORDS=slot_words,
        CHUNK=chunk_elems(slot_words, _BLOCK_WORDS, _BLOCK_WORDS),
        BLOCK=_BLOCK_WORDS,
        TO_POOL=to_pool,
        num_warps=4,
    )


def job_ints(num_planes: int) -> int:
    """Number of int64 that describe one copy to the kernel."""
    return JOB_INTS + 2 * num_planes


def _job(copy: Contiguous, word: int) -> list[int]:
    """The description of a copy that the kernel reads, sizes in words."""
    job = [copy.memory.data_ptr(), copy.table.data_ptr(), copy.memory.stride(0) // word]
    begin = 0
    for size in copy.plane_bytes:
        job += [size // word, begin // word]
        begin += size
    return job


def _alignment(pool: PoolPlanes, copies: Sequence[Contiguous]) -> int:
    """Common divisor of all sizes and addresses in bytes, at most ``pool.alignment``."""
    sizes = [pool.alignment]
    for copy in copies:
        sizes += [copy.memory.data_ptr(), copy.memory.stride(0), *copy.plane_bytes]
    return math.gcd(*sizes)
