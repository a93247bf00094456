"""Replays on several servers that run one at a time, in slices of a few seconds.

A machine's speed changes from minute to minute, by a third on a virtual machine with neighbours.
Servers that replay a trace one after the other differ by that much; servers that take turns every
few seconds all have the same share of it. The others are stopped (SIGSTOP) and so are their
clocks, by which requests are sent and timed: a slice begins where the last one ended, requests in
progress included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_elora.bench.clock import Clock
from sglang_elora.bench.driver import PLAIN, Manner, play_by
from sglang_elora.bench.record import Played
from sglang_elora.testbed.server import ServerProcess
from sglang_elora.workloads import Trace


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace and the server that it is replayed on."""

    server: ServerProcess
    trace: Trace
    manner: Manner = PLAIN


def play_in_turns(replays: Sequence[Replay], slice_s: float) -> list[Played]:
    """Replay each, in turns of ``slice_s`` seconds whose order is reversed from round to round.

    All servers are suspended before and after the call. A single replay is not interrupted.
    """
    return asyncio.run(_play_in_turns(replays, slice_s))


async def _play_in_turns(replays: Sequence[Replay], slice_s: float) -> list[Played]:
    clocks = [Clock() for _ in replays]
    tasks = [
        asyncio.create_task(play_by(clock, replay.server.url, replay.trace, replay.manner))
        for clock, replay in zip(clocks, replays, strict=True)
    ]
    left = list(zip(replays, clocks, tasks, strict=True))
    try:
        while left:
            for replay, clock, task in left:
                replay.server.resume()
                clock.start()
                await asyncio.wait([task], timeout=None if len(left) == 1 else slice_s)
                clock.stop()
                replay.server.suspend()
            left = [(replay, clock, task) for replay, clock, task in left if not task.done()]
            left.reverse()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return [task.result() for task in tasks]
