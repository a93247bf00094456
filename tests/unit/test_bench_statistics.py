"""Ratios with intervals, which sides are compared, and the main table, against figures by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from sglang_elora.bench.compared import at_edge, best_splits, compared, systems
from sglang_elora.bench.intervals import ratios
from sglang_elora.bench.main_table import MainTable, main_table
from sglang_elora.bench.record import Record
from sglang_elora.bench.result import Result, by_block, by_side, provenance

WARM_UP_S, DURATION_S = 10.0, 100.0


def record(session: int, turn: int, ttft_ms: float | None, due_s: float = 50.0) -> Record:
    first_s = None if ttft_ms is None else due_s + ttft_ms / 1e3
    return Record(
        session=session,
        turn=turn,
        adapter="a000",
        due_s=due_s,
        sent_s=due_s,
        first_s=first_s,
        last_s=None if first_s is None else first_s + 0.02,
        num_prompt=10,
        num_cached=0,
        num_from_host=0,
        output=(1, 2, 3),
        error="gone" if ttft_ms is None else None,
    )


def run_of(side: str, number: int, records: Sequence[Record]) -> Result:
    options = {"turns_per_s": 2.0, "warm_up_s": WARM_UP_S}
    return Result("chat", side, number, DURATION_S, tuple(records), None, None, **options)


def table_of(results: Sequence[Result]) -> MainTable | None:
    blocks = by_block(results)
    return main_table(blocks, {name: compared(block) for name, block in blocks.items()})


def sessions(ttft_ms: Sequence[Sequence[float]]) -> list[Record]:
    """One session per item, one turn per number."""
    return [record(i, j, ms) for i, turns in enumerate(ttft_ms) for j, ms in enumerate(turns)]


def test_ratio_is_over_requests_that_both_answered_after_the_warm_up() -> None:
    ours = [record(0, 0, 10), record(1, 0, 30), record(2, 0, 999, due_s=5), record(3, 0, None)]
    theirs = [record(0, 0, 40), record(1, 0, 40), record(2, 0, 1, due_s=5), record(3, 0, 5)]
    found = ratios({0: ours}, {0: theirs}, WARM_UP_S)["ttft_mean_ms"]
    assert found.value == pytest.approx(40 / 80)
    assert found.by_run == {0: pytest.approx(0.5)}
    assert ratios({0: ours}, {1: theirs}, WARM_UP_S) == {}


def test_ratio_interval_has_no_width_where_all_sessions_agree() -> None:
    ours, theirs = {0: sessions([[10.0]] * 20)}, {0: sessions([[20.0]] * 20)}
    for name in ("ttft_mean_ms", "ttft_p95_ms"):
        found = ratios(ours, theirs, WARM_UP_S)[name]
        assert (found.low, found.value, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_ratio_interval_resamples_sessions_and_not_requests() -> None:
    """Ten equal turns in a session tell no more than one."""
    rng = random.Random(0)
    means = [rng.uniform(5, 50) for _ in range(40)]
    theirs_short, theirs_long = sessions([[20.0]] * 40), sessions([[20.0] * 10] * 40)
    short = ratios({0: sessions([[m] for m in means])}, {0: theirs_short}, WARM_UP_S)
    long = ratios({0: sessions([[m] * 10 for m in means])}, {0: theirs_long}, WARM_UP_S)
    assert short["ttft_mean_ms"].high - short["ttft_mean_ms"].low > 0.1
    for name in ("ttft_mean_ms", "ttft_p95_ms"):
        assert long[name].low == pytest.approx(short[name].low, rel=0.03)
        assert long[name].high == pytest.approx(short[name].high, rel=0.03)


def test_ratio_interval_covers_the_truth_in_about_95_percent_of_samples() -> None:
    rng, covered = random.Random(1), 0
    for _ in range(100):
        ours = sessions([[rng.expovariate(1 / 10) for _ in range(3)] for _ in range(60)])
        theirs = sessions([[rng.expovariate(1 / 20) for _ in range(3)] for _ in range(60)])
        found = ratios({0: ours}, {0: theirs}, WARM_UP_S)["ttft_mean_ms"]
        covered += found.low <= 0.5 <= found.high
    assert 85 <= covered <= 100


def test_ratio_pools_runs_and_keeps_each_runs_ratio() -> None:
    ours = {0: sessions([[10.0], [10.0]]), 1: sessions([[30.0], [30.0]])}
    theirs = {0: sessions([[20.0], [20.0]]), 1: sessions([[20.0], [20.0]])}
    found = ratios(ours, theirs, WARM_UP_S)["ttft_mean_ms"]
    assert found.value == pytest.approx(1.0)
    assert found.by_run == {0: pytest.approx(0.5), 1: pytest.approx(1.5)}
    assert (found.low, found.high) == pytest.approx((1.0, 1.0)), "each resample has both runs"
    assert found.with_runs == "1.000 [1.000, 1.000] (runs 0.500 to 1.500)"


SIDES = {
    "stock-default": 400.0,
    "stock-default+hicache": 300.0,
    "stock-tuned:6": 250.0,
    "stock-tuned:8": 200.0,
    "stock-tuned:8+grouped": 160.0,
    "stock-tuned:8+grouped+overlap": 120.0,
    "stock-tuned:10+grouped+overlap": 130.0,
    "elora:elora": 100.0,
}


@pytest.fixture
def results() -> list[Result]:
    return [
        run_of(side, number, sessions([[ms]] * 10))
        for side, ms in SIDES.items()
        for number in (0, 1)
    ]


def test_best_split_is_taken_among_splits_of_the_same_options(results: list[Result]) -> None:
    assert best_splits(by_side(results)) == {
        "best static split": "stock-tuned:8",
        "best static split+grouped": "stock-tuned:8+grouped",
        "best static split+grouped+overlap": "stock-tuned:8+grouped+overlap",
    }
    pairs = compared(results)
    assert len(pairs) == 5
    fair = pairs["elora:elora", "best static split+grouped+overlap"]["ttft_mean_ms"]
    assert fair.value == pytest.approx(100 / 120)


def test_best_split_at_the_edge_of_the_tried_ones_is_marked(results: list[Result]) -> None:
    runs = by_side(results)
    assert at_edge("stock-tuned:8", runs) and at_edge("stock-tuned:8+grouped+overlap", runs)
    assert not at_edge("stock-tuned:8+grouped", runs), "the only one: nothing was swept"
    more = by_side([*results, run_of("stock-tuned:10", 0, sessions([[300.0]]))])
    assert not at_edge("stock-tuned:8", more)


def test_main_table_has_systems_as_columns_in_the_order_of_what_they_add(
    results: list[Result],
) -> None:
    assert list(systems(by_side(results))) == [
        "stock-default",
        "stock-default+hicache",
        "best static split",
        "best static split+grouped",
        "best static split+grouped+overlap",
        "elora:elora",
    ]
    found = table_of(results)
    assert found is not None
    about, _head, splits, ttft, over, *_ = str(found).splitlines()
    assert about.endswith("ours / it [95% interval over sessions]; 2 seeds x 100 s")
    assert splits.split()[2:] == [
        *("stock-tuned:8", "stock-tuned:8+grouped", "stock-tuned:8+grouped+overlap")
    ]
    assert ttft.split()[-6:] == ["400", "300", "200", "160", "120", "100"]
    assert "0.250 [0.250, 0.250]" in over and over.endswith(" 1")
    assert found.markdown.count("\n| ") > 6
    assert table_of(results[:2]) is None, "no side of ours"


def test_main_table_shows_ours_with_the_fewest_options(results: list[Result]) -> None:
    others = ("elora:elora_paper", "elora:elora+sessions", "elora:elora@2", "elora:lru")
    more = [run_of(side, 0, sessions([[90.0]] * 10)) for side in others]
    for some, ours in ((more, "elora:elora@2"), ([*more, *results], "elora:elora")):
        found = table_of([*some, *results[:2]])
        assert found is not None and found.head[-1] == ours


def test_provenance_names_what_makes_rows_unfit_for_results() -> None:
    row = {"commit": "abc", "host": "h1", "cpu": "2 x some", "begun_at": "2026-01-01T00:00:00"}
    link = {"calibrated_on": "h1"}
    assert provenance([{**row, "link": link}]) == (
        "commit abc; machine h1 (2 x some), begun 2026-01-01T00:00:00 to 2026-01-01T00:00:00"
    )
    faulty = provenance([row, {**row, "commit": "abd-dirty", "host": "h2", "link": link}])
    for text in ("several commits", "several machines", "uncommitted", "another machine's link"):
        assert text in faulty.partition("NOT FOR RESULTS: ")[2]
    assert "NOT FOR RESULTS" not in provenance([{}])
