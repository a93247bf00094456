"""Hints are followed while enough of them are used; orders always."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.swapper.pending_hints import (
    CREDIT_STEPS,
    HINT_STEPS,
    HINTED_SHARE,
    MAX_PENDING,
    MOST_CREDIT,
    ORDER_STEPS,
    PendingHints,
)


def follows(expected: PendingHints, adapter_id: str, num_slots: int = 1) -> bool:
    """Return whether a hint for a non-resident adapter is followed; load the adapter if so."""
    expected.add(adapter_id, ordered=False)
    may_come = expected.is_followed(adapter_id, num_slots, 0, is_there=False)
    if may_come:
        expected.came(adapter_id)
    return may_come


@pytest.mark.parametrize(("ordered", "steps"), [(False, HINT_STEPS), (True, ORDER_STEPS)])
def test_pending_hints_expire_after_some_steps(ordered: bool, steps: int) -> None:
    expected = PendingHints(1000)
    expected.add("a", ordered=ordered)
    for _ in range(steps):
        expected.step()
        assert expected.due() == ["a"]
    expected.step()
    assert expected.due() == [] and not expected


def test_pending_hints_are_bounded_and_orders_come_first() -> None:
    expected = PendingHints(1000)
    taken = [expected.add(f"h{i}", ordered=False) for i in range(MAX_PENDING + 3)]
    assert taken == [True] * MAX_PENDING + [False] * 3
    assert expected.add("h5", ordered=True), "an order for what a hint named"
    due = expected.due()
    assert due[0] == "h5" and len(due) == MAX_PENDING == len(set(due))


def test_unused_hints_cost_credit_and_used_ones_do_not() -> None:
    expected = PendingHints(1000)
    for i in range(5 * MOST_CREDIT):
        assert follows(expected, f"true-{i}")
        assert expected.used(f"true-{i}")
    for i in range(MOST_CREDIT):
        assert follows(expected, f"false-{i}")
        assert not expected.forget("nobody")
    assert not follows(expected, "one more")
    expected.add("told", ordered=True)
    assert expected.is_followed("told", 1, 0, is_there=False)
    for _ in range(CREDIT_STEPS):
        expected.step()
    assert follows(expected, "later") and not follows(expected, "and another")


def test_hint_holds_a_resident_adapter_only_if_loaded_by_a_hint() -> None:
    expected = PendingHints(1000)
    expected.add("mine", ordered=False)
    expected.add("theirs", ordered=False)
    expected.came("mine")
    assert expected.is_followed("mine", 1, 0, is_there=True)
    assert not expected.is_followed("theirs", 1, 0, is_there=True)
    expected.used("mine")
    expected.add("mine", ordered=False)
    assert not expected.is_followed("mine", 1, 0, is_there=True)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_hints_hold_at_most_their_share_or_one_adapter(sizes: list[int]) -> None:
    expected, held = PendingHints(1000), []
    for i, num_slots in enumerate(sizes):
        if expected.is_followed(f"a{i}", num_slots, sum(held), is_there=False):
            held.append(num_slots)
    assert held and (len(held) == 1 or sum(held) <= HINTED_SHARE * 1000)
