"""Prefill is timed on the stream that SGLang runs batches on."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BATCH_MS = 250.0


class Stream:
    """Counts the events recorded on it; ``queued_ms`` is the work queued on it so far."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.queued_ms = 0.0


class Event:
    """A timed event. It has run only once the host has waited for it, or for a later one."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.has_run = False

    def record(self, stream: Stream) -> None:
        self.at_ms = stream.queued_ms
        self._stream = stream
        stream.events.append(self)

    def synchronize(self) -> None:
        for event in self._stream.events:
            event.has_run |= event.at_ms <= self.at_ms

    def elapsed_time(self, end: Event) -> float:
        if not (self.has_run and end.has_run):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return end.at_ms - self.at_ms


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``MeasuredCosts`` on a device of these streams and events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.measured_costs import MeasuredCosts
        from sglang_elora.srt.scheduler import batch_times
    schedule_stream = Stream()
    device = SimpleNamespace(Event=Event, current_stream=lambda: schedule_stream)
    monkeypatch.setattr(torch, "get_device_module", lambda name: device)
    return SimpleNamespace(
        MeasuredCosts=MeasuredCosts, module=batch_times, schedule_stream=schedule_stream
    )


@pytest.mark.parametrize("enable_overlap", [True, False])
def test_prefill_is_timed_on_the_stream_that_batches_run_on(
    enable_overlap: bool, measuring: Any
) -> None:
    """``--disable-overlap-schedule`` leaves the forward stream idle."""
    forward_stream = Stream()
    measure = measuring.MeasuredCosts(SimpleNamespace(tp_world_size=1), is_async=True)
    scheduler = SimpleNamespace(
        tree_cache=SimpleNamespace(elora=SimpleNamespace(measured=measure)),
        device="cuda",
        enable_overlap=enable_overlap,
        forward_stream=forward_stream,
    )
    runs_on, idle = forward_stream, measuring.schedule_stream
    if not enable_overlap:
        runs_on, idle = idle, runs_on
    added: list[tuple[list[tuple[int, int]], float]] = []
    measure._prefill.add = lambda lengths, seconds: added.append((list(lengths), seconds))

    def run_batch(self: Any, batch: Any) -> Any:
        runs_on.queued_ms += BATCH_MS
        return SimpleNamespace()

    batch = SimpleNamespace(
        hicache_consumer_index=-1,
        reqs=[None],
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        extend_lens=[1000],
        prefix_lens=[200],
    )
    result = measuring.module.time_batch(run_batch, scheduler, batch)
    assert (len(runs_on.events), len(idle.events)) == (2, 0)
    measuring.module.note_result(None, scheduler, batch, result)
    assert added == [([(1000, 200)], BATCH_MS / 1e3)]


def test_prefill_on_a_cpu_is_timed_by_the_clock(measuring: Any) -> None:
    """Batches run in the scheduler's thread there, and no event is made."""
    measure = measuring.MeasuredCosts(SimpleNamespace(tp_world_size=1))
    forward_stream = Stream()
    scheduler = SimpleNamespace(
        tree_cache=SimpleNamespace(elora=SimpleNamespace(measured=measure)),
        forward_stream=forward_stream,
    )
    batch = SimpleNamespace(hicache_consumer_index=-1)
    result = measuring.module.time_batch(lambda self, batch: SimpleNamespace(), scheduler, batch)
    begun, ended = result.elora_marks
    assert isinstance(begun, float) and begun <= ended
    assert not forward_stream.events and not measuring.schedule_stream.events
