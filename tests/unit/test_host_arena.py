"""The host arena: no block is allocated twice, for any sequence and mix of sizes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from sglang_elora.pages import (
    HostArena,
    HostBlocks,
    HostMemoryFull,
    block_bytes_for,
    lazy_memory,
    memory_outside,
)
from sglang_elora.pages.host_arena import LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES

BLOCK = 64


def arena(num_blocks: int, block_bytes: int = BLOCK) -> HostArena:
    return HostArena(torch.zeros(num_blocks * block_bytes, dtype=torch.uint8), block_bytes)


def take(made: HostArena, num_bytes: int) -> HostBlocks:
    blocks = made.take(num_bytes)
    assert blocks is not None
    made.check_invariants()
    return blocks


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("seed", range(5))
def test_host_arena_churn_of_mixed_ranks_loses_no_block_or_byte(seed: int) -> None:
    """Images of ranks 8 to 64 are allocated and freed 4,000 times; each keeps its bytes."""
    rng, rank_bytes = random.Random(seed), 100  # so that no image ends with a block
    made = arena(400)
    images: dict[int, tuple[HostBlocks, int]] = {}
    num_refused = 0
    for number in range(4000):
        num_bytes = rng.choice((8, 16, 24, 32, 64)) * rank_bytes + rng.randrange(BLOCK)
        num_free = made.num_free
        blocks = made.take(num_bytes)
        assert (blocks is None) == (-(-num_bytes // BLOCK) > num_free), "only the number decides"
        if blocks is not None:
            assert sum(len(chunk) for chunk in blocks.chunks) == num_bytes
            assert len(blocks.chunks) == len(blocks.runs)
            for chunk in blocks.chunks:
                chunk.fill_(number % 251)
            images[number] = blocks, num_bytes
        num_refused += blocks is None
        while images and (blocks is None or rng.random() < 0.3):
            left, _ = images.pop(victim := rng.choice(list(images)))
            assert all(bool((chunk == victim % 251).all()) for chunk in left.chunks)
            made.give_back(left)
            blocks = left
        made.check_invariants()
        held = sum(-(-num_bytes // BLOCK) for _, num_bytes in images.values())
        assert made.num_free + held == made.num_blocks
    assert num_refused > 100
    for blocks, _ in images.values():
        made.give_back(blocks)
    made.check_invariants()
    assert len(take(made, made.num_blocks * BLOCK).chunks) == 1, "all free runs are merged"


def test_host_arena_uses_all_scattered_free_blocks_for_one_image() -> None:
    made = arena(100)
    taken = [take(made, BLOCK) for _ in range(100)]
    for blocks in taken[::2]:
        made.give_back(blocks)
    blocks = take(made, 50 * BLOCK)
    assert len(blocks.chunks) == 50 and made.num_free == 0
    assert made.take(1) is None


def test_host_arena_allocates_the_shortest_fitting_run() -> None:
    made = arena(30)
    held = [take(made, n * BLOCK) for n in (3, 2, 10, 2, 5, 8)]
    for index in (0, 2, 4):  # runs of 3, 10 and 5 are free
        made.give_back(held[index])
    assert take(made, 4 * BLOCK).runs == ((17, 21),)
    assert take(made, 3 * BLOCK).runs == ((0, 3),)
    assert take(made, 11 * BLOCK).runs == ((5, 15), (21, 22)), "the longest runs first"


def test_host_arena_ignores_bytes_after_the_last_whole_block() -> None:
    made = HostArena(torch.zeros(3 * BLOCK + BLOCK - 1, dtype=torch.uint8), BLOCK)
    assert made.num_blocks == 3 and made.take(3 * BLOCK + 1) is None
    assert HostArena(torch.zeros(BLOCK - 1, dtype=torch.uint8), BLOCK).take(1) is None


def test_host_arena_refuses_a_double_free() -> None:
    made = arena(3)
    blocks = take(made, BLOCK)
    made.give_back(blocks)
    with pytest.raises(AssertionError, match="not held"):
        made.give_back(blocks)


def test_host_arena_on_freed_may_overwrite_freed_blocks() -> None:
    made = arena(6)
    first, middle, last = (take(made, 2 * BLOCK - 1) for _ in range(3))
    freed: list[torch.Tensor] = []

    def poison(block: torch.Tensor) -> None:
        freed.append(block)
        block.fill_(0xEE)

    made.on_freed = poison
    for blocks in (first, last):
        made.give_back(blocks)
    assert [len(block) for block in freed] == [2 * BLOCK, 2 * BLOCK], "whole blocks"
    again = take(made, 4 * BLOCK)
    assert len(again.chunks) == 2
    assert all(bool((chunk == 0xEE).all()) for chunk in again.chunks)
    assert not any(bool((chunk == 0xEE).any()) for chunk in middle.chunks)


def test_lazy_memory_is_not_resident_before_it_is_written() -> None:
    before = resident_bytes()
    made = HostArena(lazy_memory(64 * 10**9), 2**20)
    assert resident_bytes() - before < 2**24
    take(made, 2**26).chunks[0].fill_(1)
    assert 2**26 <= resident_bytes() - before + 2**24 < 2**28


def test_failed_host_allocation_names_the_flag() -> None:
    with pytest.raises(HostMemoryFull, match=r"cannot map 4611686018427387904 .*--elora-host-gb"):
        lazy_memory(2**62)
    with pytest.raises(HostMemoryFull, match=r"no 4611686018427387904 bytes .*--elora-host-gb"):
        memory_outside(arena(1), 2**62)
    assert len(lazy_memory(0)) == 0


@pytest.mark.parametrize(
    ("rank_bytes", "expected"),
    [
        (0, LEAST_BLOCK_BYTES),
        (20_000, 8192),
        (300_000, 131_072),
        (5_242_880, MOST_BLOCK_BYTES),  # an 8B model
        (20_000_000, MOST_BLOCK_BYTES),
    ],
)
def test_host_arena_block_size_follows_the_model(rank_bytes: int, expected: int) -> None:
    assert block_bytes_for(rank_bytes) == expected


@pytest.mark.parametrize("rank", [8, 16, 24, 32, 48, 64])
def test_host_arena_wastes_little_for_adapters_of_an_8b_model(rank: int) -> None:
    """Where torch's page-locked memory, rounded to a power of two, took 1.6 times their bytes."""
    rank_bytes = 5_242_880
    made = arena(1, block_bytes_for(rank_bytes))
    taken = made.blocks_for(rank * rank_bytes) * made.block_bytes
    assert taken <= 1.03 * rank * rank_bytes
