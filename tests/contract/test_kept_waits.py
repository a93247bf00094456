"""Events that a delayed forward pass waits for, in ``--elora-check-streams``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_elora.platforms.async_device import AsyncDevice, Event, Order

pytestmark = pytest.mark.filterwarnings("ignore")  # those of what SGLang imports


def test_kept_waits_use_the_load_events_as_recorded_at_launch() -> None:
    """SGLang records three loads' events in turns. A pass that would wait for a load that was
    started after it would wait for itself, as that load is fenced by it."""
    from sglang_elora.srt.scheduler.stream_check import _as_recorded

    device = AsyncDevice(Order.LATEST)
    rounds = [SimpleNamespace(load_events=[Event(device), Event(device)]) for _ in range(3)]
    counter: Any = SimpleNamespace(events=rounds, consumer_index=1)
    first: Any = object()
    for event in rounds[1].load_events:
        event.operation = first
    kept = _as_recorded(counter.events, counter)
    for event in rounds[1].load_events:
        event.operation = object()
    assert [event.operation for event in kept[1].load_events] == [first, first]
    assert kept[0] is rounds[0] and kept[2] is rounds[2]
    assert counter.events is rounds
    assert _as_recorded("another value", counter) == "another value"
    counter.consumer_index = -1
    assert _as_recorded(counter.events, counter) is rounds
