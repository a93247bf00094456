"""Times of the next use of all entries, from the trace, for clairvoyant policies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sglang_elora.sim.clairvoyant import Foreseer
from sglang_elora.sim.request import Request
from sglang_elora.sim.segment import Segment
from sglang_elora.workloads import Session, Trace, due_s

_Turn = tuple[int, int]


class _Uses:
    """The turns that use one adapter or system prompt, by due time, without those that began."""

    def __init__(self) -> None:
        self._turns: list[tuple[float, _Turn]] = []
        self._position = 0

    def add(self, moment_s: float, turn: _Turn) -> None:
        self._turns.append((moment_s, turn))

    def sort(self) -> None:
        self._turns.sort()

    def next_s(self, begun: set[_Turn]) -> float:
        """Due time of the next use, or infinity. O(1) amortised: turns begin almost in order."""
        while self._position < len(self._turns) and self._turns[self._position][1] in begun:
            self._position += 1
        left = self._position < len(self._turns)
        return self._turns[self._position][0] if left else math.inf


class Future:
    """Informs a clairvoyant policy of each entry's next use.

    Raises:
        ValueError: The trace has checks, whose uses of a conversation are not known in advance.
    """

    def __init__(self, trace: Trace, policy: Foreseer) -> None:
        self._policy = policy
        self._due: list[list[float]] = []
        self._begun: set[_Turn] = set()
        self._of_adapter: dict[str, _Uses] = {}
        self._of_system: dict[tuple[str, Sequence[int]], _Uses] = {}
        for session in trace.sessions:
            if any(turn.checks for turn in session.turns):
                raise ValueError("clairvoyant sides know no traces with checks")
            due = [s if s < trace.duration_s else math.inf for s in due_s(session)]
            self._due.append(due)
            for turn, moment_s in enumerate(due):
                if moment_s < math.inf:
                    for uses in self._shared(session):
                        uses.add(moment_s, (session.number, turn))
        for uses in (*self._of_adapter.values(), *self._of_system.values()):
            uses.sort()

    def used(self, request: Request, path: Sequence[Segment]) -> None:
        """Update the next uses of a path (deepest segment first) that a request uses now."""
        session = request.talk.session
        self._begun.add((session.number, request.turn))
        self._policy.now_s = max(self._policy.now_s, request.due_s)
        own_s = self._next(request)
        adapter_s, system_s = (uses.next_s(self._begun) for uses in self._shared(session))
        for segment in path:
            is_system = bool(session.system) and segment is request.talk.path[0]
            next_s = adapter_s if segment.entry.is_adapter else system_s if is_system else own_s
            self._policy.foresee(segment.entry, next_s)

    def made(self, request: Request, segment: Segment) -> None:
        """Set the next use of the segment that a request adds at its end."""
        self._policy.foresee(segment.entry, self._next(request))

    def _shared(self, session: Session) -> tuple[_Uses, _Uses]:
        key = (session.adapter, session.system)
        return (
            self._of_adapter.setdefault(session.adapter, _Uses()),
            self._of_system.setdefault(key, _Uses()),
        )

    def _next(self, request: Request) -> float:
        due = self._due[request.talk.session.number]
        return due[request.turn + 1] if request.turn + 1 < len(due) else math.inf
