"""What the serving benchmark's report makes of runs, against figures by hand."""

from __future__ import annotations

from sglang_elora.bench.record import Record
from sglang_elora.bench.report import after_growth
from sglang_elora.bench.result import Result

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
    return Result("chat", side, number, DURATION_S, records, None, None, warm_up_s=0.2 * DURATION_S)


def test_recovery_time_is_the_end_of_the_last_window_over_the_mark() -> None:
    """Adapters grow in number at 66.7 s; 100 ms before, so that 150 is the mark."""
    calm = {30: 100.0, 60: 100.0}
    results = [
        run_of("late", 0, {**calm, 70: 120, 75: 400, 80: 160, 90: 140}),
        run_of("at once", 0, {**calm, 70: 149, 90: 100}),
        run_of("never", 0, {**calm, 70: 100, 99: 200}),
    ]
    head, late, at_once, never = after_growth(results, window_s=5.0).splitlines()
    assert head == "active adapters grow at 67 s: mean TTFT in ms"
    assert late == "late: 100 before, 205 after, 400 in the worst 5 s; recovered: 15 s"
    assert at_once == "at once: 100 before, 124 after, 149 in the worst 5 s; recovered: 0 s"
    assert never == "never: 100 before, 150 after, 200 in the worst 5 s; recovered: not within 33 s"
