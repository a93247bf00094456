"""The sweep of static splits and the tables of simulated results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.sim.h200 import Case, next_splits
from benchmarks.sim.tables import mean_rows, over_lru, regret, seed_ratios

MOST = 34


def swept(ttft_ms: Callable[[int], float], begin: tuple[int, ...], most: int = MOST) -> int:
    """The best number of slots that a sweep ends with."""
    found = {count: ttft_ms(count) for count in begin}
    for _ in range(20):
        todo = next_splits(found, most)
        if not todo:
            return min(found, key=found.__getitem__)
        found |= {count: ttft_ms(count) for count in todo}
    raise AssertionError("the sweep does not end")


@pytest.mark.parametrize("best", [1, 5, 18, 28, 33, 34])
def test_sweep_of_splits_encloses_the_best(best: int) -> None:
    """Also a best beyond the first range, which ends at 22."""
    found = swept(lambda count: 10.0 + abs(count - best), (2, 4, 7, 14, 22))
    assert abs(found - best) <= max(1, round(0.08 * best))


def test_sweep_of_splits_stops_at_the_most_that_fit() -> None:
    assert swept(lambda count: 100.0 - count, (2, 4), most=9) == 9
    assert next_splits({9: 1.0, 8: 2.0}, 9) == []


def test_first_session_life_is_not_counted() -> None:
    def counted_from_s(workload: str, duration_s: float) -> float:
        case = Case("h200-8b", workload, 20, "elora:lru", 0, duration_s, 1.0)
        return case.counted_from_s

    assert counted_from_s("chat", 900.0) == 180.0
    assert counted_from_s("chat", 300.0) == 8 * 20.5
    assert counted_from_s("translation", 900.0) == 180.0


def row(side: str, seed: int, ttft_ms: float) -> dict[str, Any]:
    names = ("ttft_p95_ms", "tpot_mean_ms", "cached_device", "cached_host", "cold")
    others = dict.fromkeys((*names, "adapter_loads", "hit_value_s"), 1.0)
    return {"side": side, "seed": seed, "ttft_mean_ms": ttft_ms, **others}


ROWS = [
    *(row("elora:lru", seed, 12.0 + seed) for seed in (0, 1)),
    *(row("clairvoyant", seed, 8.0 + seed) for seed in (0, 1)),
    row("elora:elora", 0, 9.0),
    row("elora:elora", 1, 12.0),
]


def test_regret_is_0_of_the_oracle_and_1_of_lru() -> None:
    means = mean_rows(ROWS)
    by_side = {mean["side"]: regret(mean, means) for mean in means}
    assert by_side == {"elora:lru": 1.0, "clairvoyant": 0.0, "elora:elora": pytest.approx(0.5)}
    assert regret(means[0], means[:1]) is None, "without an oracle"
    assert regret(ROWS[0], [row("elora:lru", 0, 8.05), row("clairvoyant", 0, 8.0)]) is None


def test_table_over_lru_shows_each_seed() -> None:
    assert seed_ratios(ROWS, "elora:elora", "elora:lru") == [9 / 12, 12 / 13]
    table = over_lru({"chat": ROWS}, ["elora:elora", "slora"])
    assert "0.84 (0.75, 0.92); 0.50" in table
    assert table.splitlines()[-1].endswith("- |")
