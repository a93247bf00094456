"""Work per call and memory of ``EvictionOrder``, counted with many leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from sglang_elora.policy import Costs, PolicyContext, make_policy
from sglang_elora.tree import EvictionOrder, TierOrders
from sglang_elora.tree.eviction import REFRESH_EVERY
from sglang_elora.tree.swept_heap import SweptHeap

NUM_LEAVES = 30_000
MOST_PER_CALL = 400
"""Hashes and comparisons: a few heap operations over 90,000 entries, which are 17 levels."""


class Work:
    """Counts hashes of nodes and comparisons of priorities; a pass over a heap makes both."""

    count = 0


class Priority(int):
    def __lt__(self, other: int) -> bool:
        Work.count += 1
        return int(self) < int(other)

    def __eq__(self, other: object) -> bool:
        Work.count += 1
        return int(self) == other

    __hash__ = int.__hash__


class Leaf:
    def __init__(self, name: int) -> None:
        self.name, self.visited = name, Priority(name)

    def __hash__(self) -> int:
        Work.count += 1
        return self.name


def work_of(call: Callable[[], object]) -> int:
    before = Work.count
    call()
    return Work.count - before


def filled(num_leaves: int, num_kinds: int = 1) -> tuple[EvictionOrder[Leaf], list[Leaf]]:
    order: EvictionOrder[Leaf] = EvictionOrder(
        lambda leaf: leaf.visited, lambda leaf: leaf.name % num_kinds
    )
    leaves = [Leaf(name) for name in range(num_leaves)]
    for leaf in leaves:
        order.add(leaf)
    return order, leaves


@pytest.mark.parametrize(("num_leaves", "num_kinds"), [(NUM_LEAVES, 1), (10_000, 5_000)])
def test_pushes_do_bounded_work_and_heaps_stay_small(num_leaves: int, num_kinds: int) -> None:
    order, leaves = filled(num_leaves, num_kinds)
    rng, most_work, most_entries = random.Random(0), 0, 0
    for _ in range(5 * num_leaves // 2):
        most_work = max(most_work, work_of(lambda: order.lower(rng.choice(leaves))))
        most_entries = max(most_entries, order._num_in_heaps)
    assert most_work <= MOST_PER_CALL
    assert 2 * num_leaves < most_entries <= 3 * num_leaves
    order.check_invariants()


def test_stale_heap_entries_are_swept_by_pushes_and_refresh() -> None:
    order, leaves = filled(NUM_LEAVES)
    for leaf in leaves[1000:]:
        order.discard(leaf)
    most_work, calls = 0, 0
    while order._num_in_heaps > 3 * 1000:
        most_work = max(most_work, work_of(order.refresh))
        most_work = max(most_work, work_of(lambda: order.lower(leaves[0])))
        calls += 1
        assert calls <= NUM_LEAVES // 10
    assert most_work <= MOST_PER_CALL
    assert len(order._entry) <= 3 * 1000
    order.check_invariants()


def test_refresh_spreads_the_work_of_many_visited_leaves() -> None:
    order, leaves = filled(NUM_LEAVES)
    for leaf in leaves[1:]:
        leaf.visited = Priority(leaf.visited + NUM_LEAVES)
    for _ in range(NUM_LEAVES // 16 + 1):
        order.refresh()
    assert order.take_lowest() is leaves[0]
    assert work_of(order.take_lowest) <= MOST_PER_CALL


def test_device_order_is_refreshed_only_when_the_policy_clock_has_moved() -> None:
    policy = make_policy("lru", PolicyContext(Costs()))
    orders: TierOrders[Any] = TierOrders(policy, lambda node: False)
    refreshed = 0

    def refresh() -> None:
        nonlocal refreshed
        refreshed += 1

    orders.device.refresh = refresh  # type: ignore[method-assign]
    for _ in range(100):
        policy.advance(REFRESH_EVERY / 4)  # decode batches of few requests
        orders.refresh()
    assert refreshed == 25
    for _ in range(100):  # no slot is filled
        orders.refresh()
    assert refreshed == 25


def test_emptied_and_refilled_class_has_one_ranking_entry() -> None:
    order: EvictionOrder[Leaf] = EvictionOrder(lambda leaf: leaf.visited, lambda leaf: leaf.name)
    leaves = [Leaf(name) for name in range(20)]
    for _ in range(200):
        for leaf in leaves:
            order.add(leaf)
        for leaf in leaves:
            order.discard(leaf)
        assert order.take_lowest() is None  # which drops the emptied classes
    for leaf in leaves:
        order.add(leaf)
    assert len(order._rotation) == len(leaves)
    order.check_invariants()


def test_class_ranking_is_swept_in_parts_not_rebuilt() -> None:
    num_kinds = 5_000
    order: EvictionOrder[Leaf] = EvictionOrder(
        lambda leaf: leaf.visited, lambda leaf: leaf.name, lambda kind, lowest: Priority(lowest)
    )
    for name in range(num_kinds):
        order.add(Leaf(name))
    most_work = 0
    for _ in range(5_000):
        order.refresh()
        most_work = max(most_work, work_of(order.take_lowest))
        order.give_back()
    assert most_work <= 16 * MOST_PER_CALL  # a search ranks 16 classes again
    assert len(order._ranking) <= 3 * num_kinds
    order.check_invariants()


def test_swept_heap_equals_a_sorted_list_whenever_swept() -> None:
    rng = random.Random(0)
    heap: SweptHeap[tuple[int, int]] = SweptHeap()
    expected: list[tuple[int, int]] = []
    for number in range(5000):
        item = (rng.randrange(1000), number)
        heap.push(item)
        expected.append(item)
        if rng.random() < 0.5:
            heap.sweep(rng.randrange(8), lambda item: item)
        if rng.random() < 0.4:
            assert heap.top() == min(expected)
            expected.remove(min(expected))
            heap.pop()
        if expected and rng.random() < 0.1:
            raised = (expected[0][0] + 100, number + 10_000)
            expected.remove(min(expected))
            expected.append(raised)
            heap.replace_top(raised)
        assert len(heap) == len(expected)
    assert sorted(heap) == sorted(expected)
