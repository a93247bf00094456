"""The emulated link takes the time of one copy engine, on the test's own clock."""

from __future__ import annotations

import types

import pytest

from sglang_elora.platforms.emulated_link import Direction, Event, Link, Stream, StreamContext


class Clock:
    """A clock that advances only by ``sleep`` or when the test sets it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(clock: Clock) -> Link:
    return Link(1000.0, 0.5, clock=clock, sleep=clock.sleep)  # 1000 bytes/s, half a second each


@pytest.fixture
def copy_stream(link: Link) -> Stream:
    stream = Stream(link)
    stream.asynchronous = True
    return stream


def test_copy_on_a_compute_stream_blocks_for_latency_and_bytes(link: Link, clock: Clock) -> None:
    link.copy(2000)
    assert clock.now_s == pytest.approx(102.5)
    assert (link.num_copies, link.num_bytes) == (1, 2000)


def test_copies_to_the_host_have_an_engine_of_their_own_and_may_take_no_time(
    link: Link, clock: Clock, copy_stream: Stream
) -> None:
    link.copy(1000, Direction.TO_HOST)
    assert (clock.now_s, link.num_copies) == (100.0, 0), "they have no bandwidth yet"
    link.to_host_bytes_per_s = 500.0
    with StreamContext(copy_stream):
        link.copy(1000, Direction.TO_HOST)
    link.copy(1000)
    assert clock.now_s == pytest.approx(101.5), "the other direction is free"
    copy_stream.synchronize()
    assert clock.now_s == pytest.approx(102.5)


def test_copy_on_a_copy_stream_blocks_waiters_of_its_event(
    link: Link, clock: Clock, copy_stream: Stream
) -> None:
    event = Event(link)
    with StreamContext(copy_stream):
        link.copy(1000)
        event.record()
    assert clock.now_s == 100.0
    assert not event.query()
    clock.now_s += 1.0  # compute while the copy runs
    link.current_stream().wait_event(event)
    assert clock.now_s == pytest.approx(101.5)
    assert event.query()


def test_copies_on_two_streams_share_one_link(
    link: Link, clock: Clock, copy_stream: Stream
) -> None:
    with StreamContext(copy_stream):
        link.copy(1000)
    link.copy(0)  # on the compute stream: queued after the copy above
    assert clock.now_s == pytest.approx(102.0)


def test_layer_events_become_ready_one_by_one(
    link: Link, clock: Clock, copy_stream: Stream
) -> None:
    events = [Event(link) for _ in range(3)]
    with StreamContext(copy_stream):
        for event in events:
            link.copy(500)
            event.record()
    events[0].wait()
    assert clock.now_s == pytest.approx(101.0)
    assert [event.query() for event in events] == [True, False, False]
    assert events[0].elapsed_time(events[2]) == pytest.approx(2000.0)


def test_waiting_copy_stream_does_not_block_the_host(
    link: Link, clock: Clock, copy_stream: Stream
) -> None:
    first, second = Stream(link), copy_stream
    first.busy_until_s = 103.0
    second.wait_stream(first)
    first.record_event().wait(second)
    with StreamContext(second):
        link.copy(500)
    assert clock.now_s == 100.0
    assert second.busy_until_s == pytest.approx(104.0)


def test_event_on_an_idle_stream_is_ready_at_once(link: Link, clock: Clock) -> None:
    event = link.current_stream().record_event()
    event.synchronize()
    assert event.query()
    assert clock.now_s == 100.0


def test_stream_contexts_nest_and_are_reusable(link: Link, copy_stream: Stream) -> None:
    outer = link.current_stream()
    context = StreamContext(copy_stream)
    for _ in range(2):
        with context:
            with StreamContext(None), StreamContext(outer):
                assert link.current_stream() is outer
            assert link.current_stream() is copy_stream
        assert link.current_stream() is outer


def test_install_replaces_the_stream_api_of_the_device_module(link: Link) -> None:
    module = types.SimpleNamespace()
    link.install(module)
    stream = module.Stream(priority=0)
    with module.stream(stream), module.StreamContext(stream):
        assert module.current_stream("cpu") is stream
    module.Event(enable_timing=True).record(stream)
    stream.wait_stream(module.Stream(device="cpu"))
    assert module.current_stream() is link.stream
