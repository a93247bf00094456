"""Hit density of tables with known answers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_elora.policy.reuse_table import ReuseTable


def observe(table: ReuseTable, *ages: float, left: float | None = None, times: int = 200) -> None:
    """Record ``times`` returns at each age, and as many evictions at ``left``."""
    for _ in range(times):
        for age in ages:
            table.end(age, returned=True)
        if left is not None:
            table.end(left, returned=False)
    table.learn()


def test_reuse_table_without_data_decreases_with_age() -> None:
    index = [ReuseTable().hit_density(age) for age in (0.0, 0.01, 0.1, 1, 10, 100)]
    assert index == sorted(index, reverse=True) and len(set(index)) == len(index)


def test_hit_density_of_certain_returns_is_one_over_the_wait() -> None:
    """All return after half a turnover: keeping an entry costs that time and gives one hit."""
    table = ReuseTable()
    observe(table, 0.5)
    assert table.hit_density(0) == pytest.approx(2, rel=0.25)
    assert table.chance(0) == pytest.approx(1, abs=0.05)


def test_hit_density_halves_if_half_of_the_entries_return() -> None:
    """Half return after 0.5, the others are evicted at 0.8: P = 0.5 per 0.5 turnovers."""
    table = ReuseTable()
    observe(table, 0.5, left=0.8)
    assert table.hit_density(0) == pytest.approx(1, rel=0.25)
    assert 0.5 < table.chance(0) < 0.85


def test_chance_is_high_at_unseen_ages_and_low_after_misses() -> None:
    table = ReuseTable()
    assert table.chance(2) > 0.4
    observe(table, left=300)
    assert table.chance(2) < 0.05


def test_hit_density_is_highest_just_before_the_expected_return() -> None:
    """All return after 2 turnovers: at 1.5 a quarter of the wait is left. An index that orders by
    last use must not rise, so its value there is the one at age 0.01."""
    table = ReuseTable()
    observe(table, 2.0)
    assert table.hit_density_at(1.5) > 2 * table.hit_density_at(0.01)
    assert table.hit_density(1.5) <= table.hit_density(0.01)
    assert table.hit_density(0.01) == pytest.approx(table.hit_density_at(0.01), rel=0.01)
    assert table.hit_density_at(4) < table.hit_density_at(0.01) / 2


def test_early_evictions_do_not_change_the_chance_at_later_ages() -> None:
    """A cache under pressure evicts all at 0.1, before any entry can return."""
    table = ReuseTable()
    observe(table, 0.5, times=100)
    before = table.chance(0.2)
    for _ in range(300):
        table.end(0.1, returned=False)
    table.learn()
    assert table.chance(0.2) == pytest.approx(before, abs=0.05)


def test_outcomes_count_after_learn_or_once_many_are_pending() -> None:
    table = ReuseTable()
    before = table.chance(2)
    for _ in range(100):
        table.end(300, returned=False)
    assert table.chance(2) == before
    table.learn()
    learned = table.chance(2)
    assert learned < 0.1 * before
    for _ in range(200):
        table.end(2, returned=True)
    assert table.chance(2) > 2 * learned


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2e5), st.booleans()), max_size=200))
def test_hit_density_never_increases_with_age(ends: list[tuple[float, bool]]) -> None:
    table = ReuseTable()
    for age, returned in ends:
        table.end(age, returned=returned)
    ages = [0.0, 1e-3, 0.03, 0.5, 4, 99, 1e4, math.inf]
    index = [table.hit_density(age) for age in ages]
    assert all(a >= b > 0 for a, b in itertools.pairwise(index))
    assert all(0 <= table.chance(age) <= 1 for age in ages)
