"""The leaf order equals sorting all leaves again, at every step of any history."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_elora.tree import EvictionOrder


@dataclass(eq=False)
class Leaf:
    name: int
    visited: int = 0


def order_of(leaves: EvictionOrder[Leaf]) -> list[int]:
    """Return the names in eviction order; take all leaves and return them."""
    names = []
    while (leaf := leaves.take_lowest()) is not None:
        names.append(leaf.name)
    leaves.give_back()
    leaves.check_invariants()
    return names


def new_order() -> EvictionOrder[Leaf]:
    return EvictionOrder(lambda leaf: leaf.visited)


def test_eviction_order_is_lowest_first_with_fifo_ties() -> None:
    leaves = new_order()
    for name, visited in enumerate([5, 1, 3, 1, 5]):
        leaves.add(Leaf(name, visited))
    assert order_of(leaves) == [1, 3, 2, 0, 4]


def test_visited_leaf_moves_later_in_the_order() -> None:
    leaves = new_order()
    first, second = Leaf(1, 1), Leaf(2, 2)
    leaves.add(first)
    leaves.add(second)
    first.visited = 3
    assert order_of(leaves) == [2, 1]


def test_taken_leaf_is_not_taken_again_until_returned() -> None:
    leaves = new_order()
    leaf = Leaf(1)
    leaves.add(leaf)
    assert leaves.take_lowest() is leaf
    assert leaf in leaves
    assert leaves.take_lowest() is None
    leaves.give_back()
    assert leaves.take_lowest() is leaf


def test_returned_leaf_keeps_its_tie_order() -> None:
    leaves = new_order()
    for name in range(4):
        leaves.add(Leaf(name))
    leaves.take_lowest()
    leaves.take_lowest()
    leaves.give_back()
    assert order_of(leaves) == [0, 1, 2, 3]


def test_lowest_rank_is_the_rank_of_the_next_victim() -> None:
    leaves: EvictionOrder[Leaf] = EvictionOrder(
        lambda leaf: leaf.visited,
        lambda leaf: leaf.name % 2,
        lambda odd, visited: visited - 9 * odd,
    )
    assert leaves.lowest_rank() is None
    for name, visited in enumerate([2, 8, 4]):
        leaves.add(Leaf(name, visited))
    assert leaves.lowest_rank() == -1
    assert order_of(leaves) == [1, 0, 2]


def test_taken_leaf_that_is_removed_and_added_is_taken_again() -> None:
    leaves = new_order()
    leaf = Leaf(1)
    leaves.add(leaf)
    leaves.take_lowest()
    leaves.discard(leaf)
    leaves.add(leaf)
    leaves.check_invariants()
    assert leaves.take_lowest() is leaf
    leaves.discard(leaf)
    leaves.give_back()
    assert order_of(leaves) == []


def test_eviction_order_compares_and_subtracts_as_a_set() -> None:
    leaves = new_order()
    one, two = Leaf(1), Leaf(2)
    leaves.add(one)
    assert leaves == {one}
    assert leaves != {two}
    assert leaves - {one} == set()
    assert {two} - leaves == {two}
    assert leaves & {one, two} == {one}
    assert len(leaves) == 1


def test_heap_stays_small_under_repeated_add_and_discard() -> None:
    leaves = new_order()
    nodes = [Leaf(i) for i in range(10)]
    for _ in range(1000):
        for leaf in nodes:
            leaves.add(leaf)
            leaves.discard(leaf)
    assert leaves._num_in_heaps < 200


def test_invariant_check_finds_a_decreased_priority() -> None:
    leaves = new_order()
    leaf = Leaf(1, visited=5)
    leaves.add(leaf)
    leaf.visited = 4
    with pytest.raises(RuntimeError, match="fell from 5"):
        leaves.check_invariants()


@dataclass
class Model:
    """The same set, sorted from scratch."""

    members: list[Leaf] = field(default_factory=list)
    taken: list[Leaf] = field(default_factory=list)

    def lowest(self) -> int | None:
        waiting = [leaf for leaf in self.members if leaf not in self.taken]
        return min((leaf.visited for leaf in waiting), default=None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_eviction_order_equals_the_model_over_random_histories(seed: int) -> None:
    """Random adds, visits, discards and takes: always a leaf of the lowest priority is taken."""
    rng, clock = random.Random(seed), count(1)
    leaves, model = new_order(), Model()
    nodes = [Leaf(i) for i in range(12)]
    for _ in range(120):
        leaf = rng.choice(nodes)
        action = rng.choice(["add", "visit", "visit", "discard", "take", "give back"])
        if action == "add":
            leaves.add(leaf)
            if leaf not in model.members:
                model.members.append(leaf)
        elif action == "visit":
            leaf.visited = next(clock)
        elif action == "discard":
            leaves.discard(leaf)
            for known in (model.members, model.taken):
                if leaf in known:
                    known.remove(leaf)
        elif action == "take":
            lowest = model.lowest()
            taken = leaves.take_lowest()
            assert (taken.visited if taken else None) == lowest
            if taken is not None:
                model.taken.append(taken)
        else:
            leaves.give_back()
            model.taken.clear()
        leaves.check_invariants()
        assert leaves == set(model.members)


def test_eviction_order_does_not_depend_on_string_hashes() -> None:
    """Tensor-parallel ranks hash strings differently, and ties between classes are common."""

    @dataclass(frozen=True)
    class Kind:
        name: str
        salt: int

        def __hash__(self) -> int:
            return hash((self.name, self.salt)) if self.salt else 0

    def victims(salt: int) -> list[int]:
        rng = random.Random(1)
        kinds = [Kind(f"k{i}", salt) for i in range(30)]
        leaves: EvictionOrder[Leaf] = EvictionOrder(
            lambda leaf: leaf.visited,
            lambda leaf: kinds[leaf.name % len(kinds)],
            lambda kind, visited: visited // 4,
        )
        for i in range(300):
            leaves.add(Leaf(i, visited=rng.randrange(40)))
        found = []
        for _ in range(60):
            leaves.refresh()
            found += [leaf.name for _ in range(4) if (leaf := leaves.take_lowest())]
            leaves.give_back()
            for leaf in [leaf for leaf in leaves if leaf.name == found[-1]]:
                leaves.discard(leaf)
        return found

    first = victims(0)
    assert all(victims(salt) == first for salt in (1, 2, 3))


def test_take_lowest_asks_few_class_ranks_when_all_change() -> None:
    num_kinds, asked = 400, 0
    worth = dict(enumerate(random.Random(0).choices(range(10**6), k=num_kinds)))

    def rank(kind: int, visited: int) -> int:
        nonlocal asked
        asked += 1
        return worth[kind]

    leaves: EvictionOrder[Leaf] = EvictionOrder(
        lambda leaf: leaf.visited, lambda leaf: leaf.name, rank
    )
    for name in range(num_kinds):
        leaves.add(Leaf(name))
    for seed in (1, 2):
        most = 0
        for _ in range(num_kinds):
            before = asked
            assert leaves.take_lowest() in leaves
            leaves.give_back()
            leaves.check_invariants()
            most = max(most, asked - before)
        assert most <= 2 * 16 + 1  # independent of their number
        leaf = leaves.take_lowest()
        assert leaf is not None and leaf.name == min(worth, key=worth.__getitem__)
        leaves.give_back()
        worth.update(enumerate(random.Random(seed).choices(range(10**6), k=num_kinds)))
        for _ in range(num_kinds):
            leaves.refresh()
            leaves.take_lowest()
            leaves.give_back()
