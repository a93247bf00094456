"""What the serving benchmark's report makes of runs, against figures by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/serving"))

from driver import Record
from report import Result, adapter_cold, summary

DURATION_S = 100.0


def run_of(side: str, number: int, ttft_ms: dict[int, float]) -> Result:
    """One request per session, due at as many seconds as its number says."""
    records = tuple(
        Record(
            session=session,
            turn=0,
            adapter="a000",
            due_s=float(session),
            sent_s=float(session),
            first_s=session + 1e-3 * ms,
            last_s=session + 1e-3 * ms + 0.1,
            num_prompt=10,
            num_cached=0,
            num_from_host=0,
            output=(1, 2),
        )
        for session, ms in ttft_ms.items()
    )
    return Result("cold", side, number, DURATION_S, records, None, None)


def test_what_loads_add_is_over_requests_that_all_three_answered_after_the_warm_up() -> None:
    results = [
        run_of("elora:lru", 0, {1: 900, 30: 12, 40: 14, 50: 700}),
        run_of("elora:lru+free", 0, {1: 1, 30: 10, 40: 10}),
        run_of("elora:lru+blocking", 0, {1: 1, 30: 20, 40: 36, 60: 500}),
        run_of("elora:lru", 1, {30: 11}),
        run_of("elora:lru+free", 1, {30: 10}),
        run_of("elora:lru+blocking", 1, {30: 12}),
        run_of("elora:lru", 2, {30: 500}),  # the others have no such run
    ]
    text = adapter_cold(results)
    assert "adapter loads add 2.00 ms to mean TTFT, 10.00 ms where they block: 80.0% less" in text
    assert text.endswith("(ms by run: 3.00 of 18.00, 1.00 of 2.00)")
    assert text in summary(results)


def test_without_all_three_there_is_nothing_to_say() -> None:
    assert adapter_cold([run_of("elora:lru", 0, {30: 12}), run_of("elora:lru+free", 0, {})]) == ""
