"""Host memory for adapter images, reserved once and allocated in blocks of one size."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch

MOST_BLOCK_BYTES = 2 * 2**20
"""Largest block size. Raising it saves copies per load and wastes more memory per small adapter."""

LEAST_BLOCK_BYTES = 4096  # smallest block size: a page of the operating system

_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap exposes only since 3.13


class HostMemoryFull(RuntimeError):
    """The machine has no host memory left for an adapter or for the whole arena."""


@dataclass(frozen=True, slots=True, eq=False)
class HostBlocks:
    """Blocks that hold one image.

    Args:
        chunks: uint8 ``[bytes]`` each, in the image's byte order; their sizes add up to its size.
        runs: The blocks as ``(first, last + 1)``, one run per chunk.
    """

    chunks: tuple[torch.Tensor, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def num_blocks(self) -> int:
        return sum(end - start for start, end in self.runs)


class HostArena:
    """A block allocator for images over one range of host memory.

    An image is laid out over its blocks as if they were adjacent, across the borders of layers.
    It fits if enough blocks are free, wherever they are: fragmentation never makes free memory
    unusable, all tensor-parallel ranks decide alike, and an image wastes less than one block.
    With one extent per image or per piece, a copy would take fewer calls, but after some churn of
    mixed ranks the arena could be full with half of its bytes free. Blocks are allocated in runs
    as long as possible, so that a copy takes few calls: one per piece (``AdapterImage.pieces``) of
    an unfragmented image, and one more per additional run.

    The arena never allocates memory. It is not locked: only the scheduler's thread takes and frees
    blocks, and a reader's thread writes into blocks that were taken for it beforehand.

    Args:
        memory: uint8 ``[bytes]``, page-locked if a device copies from it.
        block_bytes: Size of a block. Bytes beyond the last whole block are not used.

    Attributes:
        on_freed: Called with the uint8 tensor of each freed run of blocks, before it can be taken
            again.
    """

    def __init__(self, memory: torch.Tensor, block_bytes: int) -> None:
        assert memory.dtype == torch.uint8 and memory.is_contiguous(), memory.dtype
        self.on_freed: Callable[[torch.Tensor], None] | None = None
        self.block_bytes = block_bytes
        self.num_blocks = len(memory) // block_bytes
        self.num_free = self.num_blocks
        self._memory = memory
        # Free runs in ascending order, no two of them adjacent.
        self._free = [(0, self.num_blocks)] if self.num_blocks else []
        self._held: dict[int, HostBlocks] = {}  # by id() of the blocks

    def blocks_for(self, num_bytes: int) -> int:
        """The number of blocks that an image of ``num_bytes`` takes."""
        return -(-num_bytes // self.block_bytes)

    def take(self, num_bytes: int) -> HostBlocks | None:
        """Blocks for ``num_bytes``, with undefined content; None if too few are free."""
        num_blocks = self.blocks_for(num_bytes)
        if num_blocks > self.num_free:
            return None
        runs = self._choose(num_blocks)
        taken = dict(runs)  # start -> end
        self._free = [
            (taken.get(start, start), end)
            for start, end in self._free
            if taken.get(start, start) < end
        ]
        self.num_free -= num_blocks
        chunks = []
        for start, end in runs:
            chunks.append(self._tensor(start, end)[:num_bytes])
            num_bytes -= len(chunks[-1])
        blocks = HostBlocks(tuple(chunks), tuple(runs))
        self._held[id(blocks)] = blocks
        return blocks

    def give_back(self, blocks: HostBlocks) -> None:
        """Free blocks that ``take`` returned. The caller must not access them afterwards."""
        assert self._held.pop(id(blocks), None) is blocks, "these blocks are not held"
        if self.on_freed is not None:
            for start, end in blocks.runs:
                self.on_freed(self._tensor(start, end))
        self.num_free += blocks.num_blocks
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, *blocks.runs]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._free = merged

    def check_invariants(self) -> None:
        """Check that each block is either free or held once, and that free runs are merged.

        Raises:
            AssertionError: A block is lost or held twice, or adjacent free runs are not merged.
        """
        held = [run for blocks in self._held.values() for run in blocks.runs]
        runs = sorted([*self._free, *held])
        ends = [0, *(end for _, end in runs)]
        starts = [*(start for start, _ in runs), self.num_blocks]
        assert ends == starts, f"blocks are lost or held twice: {runs} of {self.num_blocks}"
        assert all(start < end for start, end in runs), runs
        assert self.num_free == sum(end - start for start, end in self._free), self.num_free
        assert self._free == sorted(self._free), self._free
        borders = {end for _, end in self._free} & {start for start, _ in self._free}
        assert not borders, f"free runs meet at {borders}"

    def _choose(self, num_blocks: int) -> list[tuple[int, int]]:
        """Runs of ``num_blocks`` in total, each at the start of a free run, in ascending order.

        Taken from the shortest free run that is long enough, otherwise from the longest ones.
        """
        whole = [run for run in self._free if run[1] - run[0] >= num_blocks]
        if whole and num_blocks:
            start, _ = min(whole, key=lambda run: run[1] - run[0])
            return [(start, start + num_blocks)]
        chosen = []
        for start, end in sorted(self._free, key=lambda run: run[0] - run[1]):
            if not num_blocks:
                break
            length = min(end - start, num_blocks)
            chosen.append((start, start + length))
            num_blocks -= length
        return sorted(chosen)

    def _tensor(self, start: int, end: int) -> torch.Tensor:
        return self._memory[start * self.block_bytes : end * self.block_bytes]


def block_bytes_for(rank_bytes: int) -> int:
    """A good block size for a model: half of ``rank_bytes``, rounded down to a power of two.

    An adapter of rank 8 then has about 16 blocks: it wastes about 3% of its bytes, and if fully
    fragmented takes 16 more copy calls than if contiguous (128 more at rank 64).

    Args:
        rank_bytes: Bytes of an adapter of rank 1 on all modules, in all layers.
    """
    power = 1 << max(rank_bytes // 2, 1).bit_length() - 1
    return min(max(power, LEAST_BLOCK_BYTES), MOST_BLOCK_BYTES)


def lazy_memory(num_bytes: int) -> torch.Tensor:
    """uint8 ``[num_bytes]`` of zeros that use physical memory only once they are written.

    The operating system reserves nothing: the mapping may be larger than the machine's memory.

    Raises:
        HostMemoryFull: There is no address space for it.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        mapped = mmap.mmap(-1, num_bytes, flags=flags)
    except (OSError, OverflowError) as error:
        raise HostMemoryFull(
            f"the machine cannot map {num_bytes} bytes of host memory for adapters ({error}): "
            "lower --elora-host-gb"
        ) from error
    return torch.frombuffer(mapped, dtype=torch.uint8)


def memory_outside(arena: HostArena, num_bytes: int) -> torch.Tensor:
    """uint8 ``[num_bytes]`` of ordinary memory, for an image that the arena can never hold.

    Raises:
        HostMemoryFull: The machine does not have enough free memory.
    """
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        size = arena.num_blocks * arena.block_bytes
        raise HostMemoryFull(
            f"the machine has no {num_bytes} bytes of host memory for the adapter, which does not "
            f"fit into the {size} bytes of --elora-host-gb: free memory of the machine, or start "
            "the server with an --elora-host-gb that the adapter fits into"
        ) from error
