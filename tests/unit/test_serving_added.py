"""What the serving benchmark says loads add, against figures by hand."""

from __future__ import annotations

import pytest

from benchmarks.serving.added import Round, added, report, rounds_of


def test_added_ttft_is_relative_to_free_loads() -> None:
    found = added([Round(ours=12, blocking=30, free=10), Round(ours=11, blocking=25, free=9)])
    assert (found.ours, found.blocking) == (2.0, 18.0)
    assert found.less == pytest.approx(1 - 2 / 18)


def test_added_ttft_interval_widens_with_disagreeing_rounds() -> None:
    equal = added([Round(11, 20, 10)] * 8)
    assert equal.low == equal.less == equal.high == pytest.approx(0.9)
    unequal = added([Round(11, 20, 10), Round(15, 20, 10)] * 4)
    assert unequal.low < unequal.less < unequal.high
    assert unequal.low >= 0.5 and unequal.high <= 0.9


def test_added_ttft_interval_is_deterministic() -> None:
    rounds = [Round(11, 20, 10), Round(12, 21, 9), Round(10, 25, 10)]
    assert added(rounds) == added(rounds)


def test_added_ttft_text_names_both_times_and_the_share() -> None:
    text = str(added([Round(11, 20, 10)] * 8))
    assert text == (
        "a load adds 1.00 ms to TTFT, 10.00 ms where it blocks: 90.0% less (90.0% to 90.0%)"
    )


def test_added_ttft_rounds_are_built_from_request_rows() -> None:
    def row(clients: int, number: int, side: str, ttft_ms: float) -> dict[str, object]:
        due_s = 5.0
        times = {"due_s": due_s, "first_s": due_s + ttft_ms / 1e3}
        return {"clients": clients, "round": number, "side": f"elora:lru{side}", **times}

    rows = [
        *(row(1, 0, "", ms) for ms in (11, 13)),
        *(row(1, 0, "+blocking", ms) for ms in (30, 34)),
        *(row(1, 0, "+free", ms) for ms in (9, 11)),
        *(row(3, 1, side, 10) for side in ("", "+blocking", "+free")),
    ]
    found = rounds_of(rows)
    assert list(found) == [1, 3]
    (only,) = found[1]
    assert (only.ours, only.blocking, only.free) == pytest.approx((12, 32, 10))
    assert report(rows[:6]).startswith("1 clients, TTFT 10.0 ms without loads: a load adds 2.00 ms")
