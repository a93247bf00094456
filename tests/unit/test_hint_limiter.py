"""Hints are coalesced, bounded in rate, and never kept for later."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.control import HintLimiter
from sglang_elora.control.hint_limiter import GAP_S, MOST_PER_S


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_hint_limiter_admits_an_adapter_once_per_gap() -> None:
    clock = Clock()
    gate = HintLimiter(clock)
    assert gate.admit(["a", "b", "a"]) == ["a", "b"]
    clock.now_s += GAP_S / 2
    assert gate.admit(["a", "c"]) == ["c"]
    clock.now_s += GAP_S / 2
    assert gate.admit(["a", "c"]) == ["a"]
    assert (gate.num_repeated, gate.num_over_rate) == (2, 0)


def test_hint_limiter_drops_hints_over_the_rate_and_recovers() -> None:
    clock = Clock()
    gate = HintLimiter(clock)
    burst = int(MOST_PER_S)
    assert len(gate.admit(str(i) for i in range(burst + 5))) == burst
    assert gate.num_over_rate == 5
    clock.now_s += 10 / MOST_PER_S
    assert len(gate.admit(str(i) for i in range(burst, burst + 50))) == 10


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, 3_000)), max_size=200))
def test_hint_limiter_never_exceeds_its_rate(arrivals: list[tuple[float, int]]) -> None:
    clock = Clock()
    gate, num_passed = HintLimiter(clock), 0
    for wait_s, adapter in arrivals:
        clock.now_s += wait_s
        num_passed += len(gate.admit(map(str, range(adapter, adapter + 40))))
    assert num_passed <= MOST_PER_S + (clock.now_s - 100.0) * MOST_PER_S + 1
    passed_or_not = num_passed + gate.num_repeated + gate.num_over_rate
    assert passed_or_not == 40 * len(arrivals)
