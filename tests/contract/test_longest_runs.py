"""Adapters on a CPU get the longest runs of consecutive free slots."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    from sglang_elora.srt.mem_cache.longest_runs import take_longest_runs

SIZE = 64


def allocator(*, need_sort: bool = False) -> Any:
    pool: Any = None
    return TokenToKVPoolAllocator(SIZE, torch.int64, "cpu", pool, need_sort)


def num_runs(slots: list[int]) -> int:
    return sum(slot - 1 not in slots for slot in slots)


def test_adapter_gets_the_longest_run_and_kv_the_shortest() -> None:
    pool = allocator()
    pool.alloc(SIZE)
    pool.free(torch.tensor([40, 7, 41, 9, 42, 1, 2, 43]))
    assert take_longest_runs(pool, 4).tolist() == [40, 41, 42, 43]
    assert pool.alloc(2).tolist() == [7, 9]
    assert take_longest_runs(pool, 3) is None
    assert take_longest_runs(pool, 2).tolist() == [1, 2]
    assert pool.available_size() == 0


@pytest.mark.parametrize("need_sort", [False, True])
@given(
    freed=st.lists(st.integers(1, SIZE), unique=True, min_size=1),
    kept=st.integers(0, SIZE),
    data=st.data(),
)
def test_no_free_slot_is_lost_or_given_twice(
    need_sort: bool, freed: list[int], kept: int, data: st.DataObject
) -> None:
    pool = allocator(need_sort=need_sort)
    pool.alloc(SIZE)
    pool.free(torch.tensor(freed[: kept + 1]))
    pool.free(torch.tensor(freed[kept + 1 :], dtype=torch.int64))
    count = data.draw(st.integers(1, len(freed)))
    taken = take_longest_runs(pool, count).tolist()
    assert len(taken) == count and taken == sorted(taken)
    assert pool.available_size() == len(freed) - count
    left = [] if count == len(freed) else pool.alloc(len(freed) - count).tolist()
    assert sorted(taken + left) == sorted(freed)
    assert num_runs(taken) <= num_runs(freed)
