"""Servers that replay a trace in turns: each is measured as if it were alone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from sglang_elora.bench.clock import Clock
from sglang_elora.bench.record import Record
from sglang_elora.bench.turns import Replay, play_in_turns
from sglang_elora.testbed.server import ServerProcess, python_module
from sglang_elora.workloads import CHAT, Session, Trace, Turn
from tests.harness.programs.token_server import TOKEN_S

SLICE_S = 0.5
PAUSE_S = 2 * SLICE_S  # while the two others run
SHORT_S = 0.9 * PAUSE_S  # no pause is in it, whatever else the machine does
SESSIONS = tuple(
    Session(i, "adapter-0", 0.15 * i, (5, 6), (Turn((7,), 10, 0.0), Turn((8,), 10, 0.2)))
    for i in range(5)
)
TRACE = Trace(CHAT, 0, 5.0, 3.0, SESSIONS)


def until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Whether the condition holds in time; a signal takes effect a while after it was sent."""
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return condition()


def test_pauses_are_in_no_latency_and_every_turn_is_sent_when_it_is_due(tmp_path: Path) -> None:
    program = python_module("tests.harness.programs.token_server")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess([], program=program, log_path=tmp_path / f"{i}.log"))
            for i in range(3)
        ]
        for server in servers:
            server.suspend()
        begun_s = time.monotonic()
        played = play_in_turns([Replay(server, TRACE) for server in servers], slice_s=SLICE_S)
        took_s = time.monotonic() - begun_s
        processes = [psutil.Process(server.pid) for server in servers]
        assert until(lambda: all(p.status() == psutil.STATUS_STOPPED for p in processes))
    assert took_s >= sum(one.wall_s for one in played) > 3 * 0.9, "they did not run together"
    for one in played:
        assert len(one.records) == 10
        for record in one.records:
            assert record.error is None and record.first_s is not None
            assert record.last_s is not None
            assert record.sent_s - record.due_s < SHORT_S
            assert record.first_s - record.sent_s < SHORT_S
            assert record.last_s - record.first_s < SHORT_S
        # A sleep of the server that ends during a pause is shorter by the clock, and a client that
        # reads late finds several tokens at once.
        assert statistics.fmean(map(_duration_s, one.records)) > 5 * TOKEN_S


def _duration_s(record: Record) -> float:
    assert record.first_s is not None and record.last_s is not None
    return record.last_s - record.first_s


def test_failed_replay_is_raised_and_a_suspended_server_can_be_ended(tmp_path: Path) -> None:
    program = python_module("tests.harness.programs.token_server")
    with ServerProcess([], program=program, log_path=tmp_path / "log") as server:
        server.suspend()
        gone = ServerProcess([], log_path=tmp_path / "gone")
        gone.suspend = gone.resume = lambda: None  # type: ignore[method-assign]
        with pytest.raises(Exception, match="connection"):
            play_in_turns([Replay(server, TRACE), Replay(gone, TRACE)], slice_s=0.2)
    assert server.alive() == []


def test_clock_that_is_stopped_wakes_nobody() -> None:
    async def nap() -> tuple[float, float]:
        clock = Clock()
        sleeping = asyncio.create_task(clock.sleep_until(0.1))
        await asyncio.sleep(0.2)
        assert not sleeping.done() and clock.now_s() == 0.0
        clock.start()
        await asyncio.sleep(0.05)
        clock.stop()
        await asyncio.sleep(0.2)
        assert not sleeping.done()
        clock.start()
        begun_s = time.perf_counter()
        await sleeping
        return clock.now_s(), time.perf_counter() - begun_s

    shown_s, waited_s = asyncio.run(nap())
    assert shown_s >= 0.1 and waited_s >= 0.04
