"""Online estimators recover the parameters of generated data."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.estimators import BatchSize, LinkCost, Popularity, PrefillCost
from sglang_elora.estimators.popularity import MOST_ROWS


def test_expected_distinct_equals_a_hand_computed_value() -> None:
    """Shares 0.5, 0.25, 0.25 and batches of two: 0.75 + 2 * 0.4375."""
    popularity = Popularity(half_lives=(1e12, 1e12))
    for adapter_id in "aabc":
        popularity.use(adapter_id)
    assert [popularity.share(adapter_id) for adapter_id in "abcd"] == pytest.approx(
        [0.5, 0.25, 0.25, 0]
    )
    assert popularity.expected_distinct(2) == pytest.approx(0.75 + 2 * 0.4375)
    assert popularity.expected_distinct(1) == pytest.approx(1)
    assert popularity.expected_distinct(1e6) == pytest.approx(3)


def test_popularity_without_requests_is_zero() -> None:
    popularity = Popularity()
    assert popularity.expected_distinct(8) == 0
    assert popularity.share("a") == 0
    popularity.forget("a")


def test_popularity_follows_a_change_and_keeps_long_term_shares() -> None:
    popularity = Popularity(half_lives=(10, 1000))
    for _ in range(500):
        popularity.use("old")
    for _ in range(30):
        popularity.use("new")
    assert popularity.share("new") > 0.45  # the fast half has all but forgotten the old one
    assert popularity.share("old") > 0.45  # the slow half has not
    assert popularity.share("old") + popularity.share("new") == pytest.approx(1)


def test_popularity_of_a_forgotten_adapter_is_redistributed() -> None:
    popularity = Popularity()
    for adapter_id in "ab":
        popularity.use(adapter_id)
    popularity.forget("a")
    assert popularity.share("b") == pytest.approx(1)
    popularity.use("c")
    assert popularity.share("a") == 0
    assert popularity.share("b") + popularity.share("c") == pytest.approx(1)


def test_popularity_weights_do_not_overflow() -> None:
    popularity = Popularity(half_lives=(1, 2))
    for i in range(5000):
        popularity.use(str(i % 3))
    assert sum(popularity.share(str(i)) for i in range(3)) == pytest.approx(1)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.floats(1, 64))
def test_expected_distinct_is_bounded_by_batch_and_adapters_seen(
    uses: list[str], batch: float
) -> None:
    popularity = Popularity()
    for adapter_id in uses:
        popularity.use(adapter_id)
    assert 0.99 <= popularity.expected_distinct(batch) <= min(batch, len(set(uses))) + 1e-6


def test_batch_size_is_the_mean_of_the_last_five_seconds() -> None:
    sizes = BatchSize()
    assert sizes.mean == 1
    for time_s, size in [(0.0, 100), (1.0, 2), (5.5, 4)]:
        sizes.add(time_s, size)
    assert sizes.mean == 3  # the first is 5.5 s old
    sizes.add(60.0, 7)
    assert sizes.mean == 7


def test_prefill_cost_fit_recovers_the_true_rates() -> None:
    rng, cost = random.Random(0), PrefillCost()
    for _ in range(300):
        batch = [(rng.randint(10, 2000), rng.randint(0, 4000)) for _ in range(rng.randint(1, 4))]
        attended = sum(new * (cached + new / 2) for new, cached in batch)
        seconds = 4e-3 + 90e-6 * sum(new for new, _ in batch) + 8e-9 * attended
        cost.add(batch, seconds * rng.uniform(0.95, 1.05))
    token, batch_alone = cost.rates()
    assert token == pytest.approx(90e-6 + 8e-9 * 2500, rel=0.1)  # half of 1,000 new ones
    assert batch_alone == pytest.approx(4e-3, abs=4e-3)  # small compared with 200 ms
    assert cost.seconds(1000, 500) == pytest.approx(4e-3 + 90e-3 + 8e-6 * 1000, rel=0.05)


def test_prefill_cost_fit_follows_a_change() -> None:
    cost = PrefillCost()
    for per_token in (30e-6, 120e-6):
        for i in range(800):
            cost.add([(100 + i % 7 * 50, 0)], per_token * (100 + i % 7 * 50))
    assert cost.rates()[0] == pytest.approx(120e-6, rel=0.1)


def test_prefill_cost_fit_ignores_batches_in_which_the_process_was_stopped() -> None:
    cost = PrefillCost()
    for num_new in range(100, 300):
        cost.add([(num_new, 0)], 1e-3 + 2e-4 * num_new)
    before = cost.rates()
    for _ in range(3):
        cost.add([(200, 0)], 10.0)
    cost.add([(200, 0)], 1e-3 + 2e-4 * 200)
    assert cost.rates() == pytest.approx(before, rel=0.02)


def test_prefill_cost_fit_follows_a_change_by_a_factor_of_a_hundred() -> None:
    cost = PrefillCost()
    for token_s in (2e-4, 2e-2):
        for i in range(2000):
            num_new = 100 + i % 200
            cost.add([(num_new, 0)], token_s * num_new)
            if i % 64 == 0:
                cost.rates()
        assert cost.seconds(200, 0) == pytest.approx(token_s * 200, rel=0.05)


def test_prefill_cost_fit_is_stable_for_batches_of_one_size() -> None:
    """Equal batches cannot separate a constant from a rate; the sum must still be right."""
    cost = PrefillCost()
    for _ in range(200):
        cost.add([(256, 0)], 10e-3)
    assert cost.seconds(256, 0) == pytest.approx(10e-3, rel=0.05)
    assert 0 < cost.rates()[0] < 1.01 * 10e-3 / 256


def test_prefill_cost_per_token_stays_positive_with_long_contexts() -> None:
    """A machine on which context costs more than the model of the cost can say."""
    rng, cost = random.Random(0), PrefillCost()
    for _ in range(300):
        new, cached = rng.choice([(rng.randint(40, 150), rng.randint(300, 1500)), (500, 0)])
        cost.add([(new, cached)], 10e-3 + 150e-6 * new + 40e-9 * (new + cached) ** 2)
    assert 100e-6 < cost.rates()[0] < 400e-6


def test_cost_estimators_return_their_initial_value_unmeasured() -> None:
    assert PrefillCost(50e-6).rates()[0] == pytest.approx(50e-6)
    assert LinkCost(3e-6, 20e-6).rates()[0] == pytest.approx(3e-6)
    assert LinkCost(3e-6, 20e-6).rates()[1] == pytest.approx(20e-6)


def test_link_cost_fit_recovers_the_true_rates() -> None:
    rng, cost = random.Random(0), LinkCost()
    for _ in range(100):
        slots = rng.choice([170, 700, 2700])
        cost.add(slots, 200e-6 + 7e-6 * slots)
    assert cost.rates()[0] == pytest.approx(7e-6, rel=0.05)
    assert cost.rates()[1] == pytest.approx(200e-6, rel=0.3)


def test_popularity_keeps_the_most_recently_used_rows_only() -> None:
    popularity = Popularity()
    for i in range(3 * MOST_ROWS):
        popularity.use(str(i))
    assert len(popularity) == MOST_ROWS and len(popularity._weights) == MOST_ROWS
    assert popularity.share("0") == 0
    shares = [popularity.share(str(i)) for i in range(3 * MOST_ROWS - 2, 3 * MOST_ROWS)]
    assert 0 < shares[0] < shares[1]
    popularity.use(str(2 * MOST_ROWS))  # the oldest is now the most recent
    popularity.use("new")
    assert popularity.share(str(2 * MOST_ROWS)) > popularity.share(str(2 * MOST_ROWS + 1)) == 0


def test_popularity_reuses_rows_of_forgotten_adapters() -> None:
    popularity = Popularity()
    for i in range(10_000):
        popularity.use(str(i))
        popularity.forget(str(i - 4))
    assert len(popularity) == 4 and len(popularity._weights) == 16
