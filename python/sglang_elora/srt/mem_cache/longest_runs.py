"""Allocation of consecutive slots, which a CPU reads without a copy."""

from __future__ import annotations

from typing import Any

import torch


def take_longest_runs(allocator: Any, num_slots: int) -> torch.Tensor | None:
    """As ``allocator.alloc``, from the longest runs of consecutive free slots.

    The shortest runs are moved to the head of the free list, from which KV is allocated.

    Args:
        allocator: A ``TokenToKVPoolAllocator``, whose streams must be synchronous: ``FreeOrder``
            does not know the new order.
        num_slots: Number of slots.

    Returns:
        Ascending slots ``[num_slots]``, int64; None if fewer are free.
    """
    free = torch.cat((allocator.free_pages, allocator.release_pages)).sort().values
    if num_slots > len(free):
        return None
    begins = torch.ones(len(free), dtype=torch.bool)
    begins[1:] = free[1:] != free[:-1] + 1
    run = begins.cumsum(0) - 1
    by_length = torch.argsort(torch.bincount(run)[run], stable=True)
    num_left = len(free) - num_slots
    allocator.free_pages, allocator.release_pages = free[by_length[:num_left]], free[:0]
    return free[by_length[num_left:]].sort().values
