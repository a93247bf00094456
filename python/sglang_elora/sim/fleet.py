"""Simulation of a fleet: servers behind a router, which sees each turn of each session.

The servers are those of ``make_engine``, each with a cache of its own. Time passes in rounds of
``ROUND_S``: the router knows how many requests each server has, and how full its pool is, as of the
round's begin, and what it has sent since then.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_elora.sim.engine import Engine
from sglang_elora.sim.request import Record
from sglang_elora.sim.routers import Router, Server
from sglang_elora.workloads import Session, Trace

ROUND_S = 0.02
"""Raising it is faster, and routers decide by older numbers of requests."""


@dataclass(frozen=True, slots=True)
class Change:
    """A server that is lost, with its cache and the requests that it has, or added, empty."""

    at_s: float
    what: Literal["lost", "added"]


@dataclass(frozen=True, slots=True)
class FleetRecord:
    server: str
    record: Record


class Fleet:
    """A router and its servers.

    Args:
        make_server: An engine with an empty cache.
        num_servers: Servers at the beginning.
    """

    def __init__(self, router: Router, make_server: Callable[[], Engine], num_servers: int) -> None:
        self.router = router
        self._make_server = make_server
        self._number = itertools.count()
        self._events = itertools.count()
        self.servers: list[Server] = []
        self.num_moves = self.num_resent = 0
        self._lost: list[Server] = []
        self._at: dict[int, Server] = {}  # session -> server of its last turn
        self._due: list[tuple[float, int, Session, int, int]] = []
        for _ in range(num_servers):
            self._add()

    def play(self, trace: Trace, changes: Sequence[Change] = ()) -> list[FleetRecord]:
        """Simulate the trace; returns the records of all servers by due time.

        Raises:
            ValueError: The trace has checks, or a server cannot hold a session.
        """
        if any(turn.checks for session in trace.sessions for turn in session.turns):
            raise ValueError("fleets are simulated without checks")
        self._duration_s = trace.duration_s
        for session in trace.sessions:
            if session.turns and session.start_s < trace.duration_s:
                self._push(session.start_s, session, 0, len(session.system))
        left = sorted(changes, key=lambda change: change.at_s)
        now_s = 0.0
        while self._due or any(server.engine.num_requests for server in self.servers):
            now_s += ROUND_S
            while left and left[0].at_s <= now_s:
                self._change(left.pop(0), now_s)
            for server in self.servers:
                server.num_requests = server.engine.num_requests
                server.usage = server.engine.usage
            self.router.begin_round(now_s, self.servers)
            while self._due and self._due[0][0] <= now_s:
                due_s, _, session, turn, num_tokens = heapq.heappop(self._due)
                self._send(session, turn, due_s, num_tokens)
            for server in self.servers:
                server.engine.run_until(now_s)
        everyone = (*self.servers, *self._lost)
        found = [FleetRecord(s.name, record) for s in everyone for record in s.engine.records]
        return sorted(found, key=lambda one: one.record.due_s)

    @property
    def num_loads(self) -> int:
        """Loads of adapters by all servers."""
        return sum(server.engine.num_loads for server in (*self.servers, *self._lost))

    def _add(self) -> None:
        server = Server(f"server-{next(self._number)}", self._make_server())
        server.engine.on_answer = self._answered
        self.servers.append(server)
        self.router.set_servers(self.servers)

    def _change(self, change: Change, now_s: float) -> None:
        if change.what == "added":
            self._add()
            self.servers[-1].engine.run_until(now_s)
            return
        lost = self.servers.pop(0)
        self._lost.append(lost)
        self.router.set_servers(self.servers)
        unanswered = lost.engine.unanswered()
        self.num_resent += len(unanswered)
        for session, turn, due_s, num_tokens in unanswered:
            self._push(due_s, session, turn, num_tokens)

    def _push(self, due_s: float, session: Session, turn: int, num_tokens: int) -> None:
        heapq.heappush(self._due, (due_s, next(self._events), session, turn, num_tokens))

    def _send(self, session: Session, turn: int, due_s: float, num_tokens: int) -> None:
        last = self._at.get(session.number)
        server = self.router.choose(session, turn, self.servers, last)
        if last is not None and server is not last:
            self.num_moves += 1
            last.engine.forget(session)
        self._at[session.number] = server
        server.num_requests += 1
        server.engine.send(session, turn, due_s, num_tokens)

    def _answered(self, session: Session, turn: int, now_s: float, num_tokens: int) -> None:
        following = turn + 1
        if following < len(session.turns):
            due_s = now_s + session.turns[following].think_s
            if due_s < self._duration_s:
                self._push(due_s, session, following, num_tokens)
                return
        self._at.pop(session.number).engine.forget(session)
