"""When everything is used next, by the trace's own times: for the clairvoyant policy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from sglang_elora.sim.clairvoyant import Clairvoyant
from sglang_elora.sim.request import Request
from sglang_elora.sim.segment import Segment
from sglang_elora.workloads import Trace, due_s


class Future:
    def __init__(self, trace: Trace, policy: Clairvoyant) -> None:
        def known(moment_s: float) -> float:
            return moment_s if moment_s < trace.duration_s else math.inf

        self._policy = policy
        self._due = [[*map(known, due_s(session))] for session in trace.sessions]
        self._of_adapter: dict[str, list[float]] = {}
        self._of_system: dict[tuple[str, Sequence[int]], list[float]] = {}
        for session, moments in zip(trace.sessions, self._due, strict=True):
            self._of_adapter.setdefault(session.adapter, []).extend(moments)
            key = (session.adapter, session.system)
            self._of_system.setdefault(key, []).extend(moments)
        for moments in (*self._of_adapter.values(), *self._of_system.values()):
            moments.sort()

    def used(self, request: Request, path: Sequence[Segment]) -> None:
        """A request uses this path, the deepest first."""
        session = request.talk.session
        now_s = self._now(request)
        self._policy.now_s = max(self._policy.now_s, now_s)
        next_s = self._next(request)
        key = (session.adapter, session.system)
        for segment in path:
            if segment.item.is_adapter:
                moment_s = _after(self._of_adapter[session.adapter], now_s)
            elif session.system and segment is request.talk.path[0]:
                moment_s = _after(self._of_system[key], now_s)
            else:
                moment_s = next_s
            self._policy.foresee(segment.item, moment_s)

    def made(self, request: Request, segment: Segment) -> None:
        """A request ends with this turn of its own."""
        self._policy.foresee(segment.item, self._next(request))

    def _now(self, request: Request) -> float:
        due_s = self._due[request.talk.session.number][request.turn]
        return min(due_s, request.due_s)  # answers took less than was assumed

    def _next(self, request: Request) -> float:
        due = self._due[request.talk.session.number]
        return due[request.turn + 1] if request.turn + 1 < len(due) else math.inf


def _after(moments: Sequence[float], now_s: float) -> float:
    position = bisect_right(moments, now_s)
    return moments[position] if position < len(moments) else math.inf
