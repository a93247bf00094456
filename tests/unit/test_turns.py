"""Turns of conversations, counted from the shape of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sglang_elora.policy import CacheEntry
from sglang_elora.policy.cache_entry import UNCOUNTED
from sglang_elora.tree import end_turn, fork

ADAPTER = CacheEntry(True, 100)


def kv() -> CacheEntry:
    return CacheEntry(False, 10)


def finish(path: Sequence[CacheEntry]) -> list[int]:
    """End a turn; the turns of the path from the top down."""
    end_turn([*reversed(path), ADAPTER])
    return [item.turns for item in path]


def test_each_finished_request_adds_one_turn() -> None:
    path = [kv(), kv()]  # prompt and answer
    assert finish(path) == [1, 1]
    path += [kv(), kv()]
    assert finish(path) == [1, 1, 2, 2]
    assert [item.turns_of_user for item in path] == [2, 2, 2, 2]
    assert ADAPTER.turns == UNCOUNTED, "an adapter has no turns"


def test_repeated_request_adds_no_turn() -> None:
    path = [kv()]
    assert finish(path) == finish(path) == [1]


def test_shared_prefix_belongs_to_no_turn() -> None:
    """Two conversations with one system prompt: the second diverges after it."""
    rest = kv()
    system = rest.split(4)
    assert finish([system, rest]) == [1, 1]
    fork(system, [ADAPTER])
    other = kv()
    assert finish([system, other]) == [0, 1]
    assert finish([system, other, kv()]) == [0, 1, 2]
    assert (system.turns_of_user, rest.turns_of_user, other.turns_of_user) == (0, 1, 2)


def test_edited_turn_replaces_its_turn() -> None:
    """The user edits the second message: both branches have two turns."""
    first, second = kv(), kv()
    finish([first])
    finish([first, second])
    common = second.split(3)
    fork(common, [first, ADAPTER])
    assert finish([first, common, kv()]) == [1, 1, 2]


def test_fork_of_a_running_request_leaves_its_rest_uncounted() -> None:
    rest = kv()
    system = rest.split(4)
    fork(system, [])
    assert (system.turns, rest.turns) == (0, UNCOUNTED)
    assert finish([system, rest]) == [0, 1]


def test_turn_without_kv_is_ignored() -> None:
    end_turn([ADAPTER])
    end_turn([])
    assert ADAPTER.turns == UNCOUNTED


def test_request_with_an_activated_adapter_is_no_turn_of_the_conversation() -> None:
    said = [kv(), kv()]
    finish(said)
    question = CacheEntry(False, 10, "judge", is_activated=True)
    assert finish([*said, question]) == [1, 1, 1]
    assert [item.turns_of_user for item in said] == [1, 1]
    assert finish([*said, kv()]) == [1, 1, 2]


def test_base_kv_that_an_activated_adapter_computed_again_keeps_its_turns() -> None:
    again = replace(kv(), turns_recalled=3)
    question = CacheEntry(False, 10, "judge", is_activated=True)
    assert finish([again, question]) == [3, 3]
    assert again.turns_of_user == 3
    assert finish([again, kv()]) == [3, 4]
