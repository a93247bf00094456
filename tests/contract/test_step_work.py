"""A scheduler iteration does less than twice the work with 10 times the nodes and requests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.swapper.step import Bench, Clock


class Calls(Clock):
    """Counts the functions, Python and C, that each call invokes; a substitute for time."""

    def time(self, name: str, call: Callable[[], Any]) -> None:
        num_calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
        self.us[name].append(num_calls)


def most_calls(scale: int) -> dict[str, float]:
    """Return the maximum over iterations, per function called."""
    calls = Calls()
    bench = Bench(300 * scale, "elora", num_adapters=100 * scale, num_waiting=100 * scale)
    bench.run(150, "off", calls)
    assert bench.counts()["adapter_loads"] > 64  # more than at the start
    return {name: max(counts) for name, counts in calls.us.items()}


def test_step_work_is_nearly_constant_in_nodes_adapters_and_queue_length() -> None:
    few, many = most_calls(1), most_calls(10)
    for name in ("step", "prepare", "retire"):
        assert many[name] <= 2 * few[name], (name, few, many)
    assert many["admit"] <= 1.5 * 10 * few["admit"]  # admission asks for each queued request
