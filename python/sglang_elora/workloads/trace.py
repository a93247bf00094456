"""Traces: multi-turn sessions, each with one adapter, and questions to others about them.

Open-loop in the starts of sessions, closed-loop within a session: a turn is sent ``think_s`` after
the end of the previous answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sglang_elora.workloads.popularity import Law
from sglang_elora.workloads.rise import Rise
from sglang_elora.workloads.workload import NOMINAL_ANSWER_S, Recorded, Workload

BASE = "-base"  # suffix of the name of a workload without adapters


@dataclass(frozen=True, slots=True)
class Check:
    """A question to another adapter about a conversation: its prompt is the conversation so far and
    ``new_tokens``, and the conversation goes on without either."""

    adapter: str
    new_tokens: Sequence[int]
    num_output: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn's new tokens and answer length; sent ``think_s`` after the previous answer. Its
    checks are sent together, at the end of its answer."""

    new_tokens: Sequence[int]
    num_output: int
    think_s: float
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    number: int
    adapter: str  # "" for the base model
    start_s: float
    system: Sequence[int]  # shared by sessions of the adapter
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        said = sum(len(turn.new_tokens) + turn.num_output for turn in self.turns)
        return len(self.system) + said

    def tokens_at(self, time_s: float) -> int:
        """Tokens of its history at ``time_s``, without the system prompt; 0 outside its life."""
        moment_s, tokens, last_s = self.start_s, 0, self.start_s
        for turn in self.turns:
            last_s = moment_s = moment_s + turn.think_s
            if moment_s <= time_s:
                tokens += len(turn.new_tokens) + turn.num_output
            moment_s += NOMINAL_ANSWER_S
        return tokens if time_s < last_s else 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Sessions by increasing start. Turns that are due after ``duration_s`` are not sent."""

    workload: Workload | Recorded
    seed: int
    turns_per_s: float
    duration_s: float
    sessions: tuple[Session, ...]

    @property
    def mean_life_s(self) -> float:
        """Mean life of a session; 0 for a recorded trace, which begins with whole sessions."""
        return self.workload.mean_life_s if isinstance(self.workload, Workload) else 0.0

    @property
    def num_turns(self) -> int:
        """Number of turns due before the end if answers take ``NOMINAL_ANSWER_S``."""
        return sum(
            moment_s < self.duration_s for session in self.sessions for moment_s in due_s(session)
        )

    def live_kv_tokens(self, time_s: float) -> int:
        """Tokens of KV of all sessions with a later turn; each system prompt counts once."""
        lengths = {session: session.tokens_at(time_s) for session in self.sessions}
        alive = {(s.adapter, s.system): len(s.system) for s, n in lengths.items() if n}
        return sum(lengths.values()) + sum(alive.values())

    @property
    def mean_live_kv_tokens(self) -> float:
        moments = [(0.5 + i) / 20 * self.duration_s for i in range(20)]
        return sum(map(self.live_kv_tokens, moments)) / len(moments)

    def rising(self, low: float, high: float) -> Trace:
        """The same sessions, progressively faster: times between starts and thinking times are
        divided by a factor that rises from ``low`` to ``high`` (``Rise``)."""
        rise = Rise(low, high, self.duration_s)
        sessions = tuple(
            replace(
                session,
                start_s=rise.new_time(session.start_s),
                turns=tuple(
                    replace(turn, think_s=turn.think_s / rise.factor(moment_s))
                    for turn, moment_s in zip(session.turns, due_s(session), strict=True)
                ),
            )
            for session in self.sessions
        )
        return replace(self, duration_s=rise.new_duration_s, sessions=sessions)

    def without_adapters(self) -> Trace:
        """The same sessions and checks, all with the base model; the workload's name ends in
        ``BASE``."""
        workload = replace(self.workload, name=f"{self.workload.name}{BASE}")
        sessions = tuple(
            replace(session, adapter="", turns=tuple(map(_of_base, session.turns)))
            for session in self.sessions
        )
        return replace(self, workload=workload, sessions=sessions)

    def facts(self) -> dict[str, Any]:
        return {
            "workload": asdict(self.workload),
            "seed": self.seed,
            "turns_per_s": self.turns_per_s,
            "duration_s": self.duration_s,
        }

    def save(self, path: Path) -> None:
        """Write JSON lines: first the trace's facts, then one line per session."""
        rows = [self.facts(), *map(asdict, self.sessions)]
        path.write_text("".join(json.dumps(row, default=list) + "\n" for row in rows))

    @classmethod
    def load(cls, path: Path) -> Trace:
        facts, *rows = [_tuples(json.loads(line)) for line in path.read_text().splitlines()]
        about = facts.pop("workload")
        workload = Recorded(**about) if "path" in about else _workload(about)
        sessions = tuple(
            Session(**{**row, "turns": tuple(_turn(turn) for turn in row["turns"])}) for row in rows
        )
        return cls(workload, sessions=sessions, **facts)


def due_s(session: Session) -> list[float]:
    """Due time of each turn if every answer takes ``NOMINAL_ANSWER_S``."""
    moment_s, found = session.start_s - NOMINAL_ANSWER_S, []
    for turn in session.turns:
        moment_s += NOMINAL_ANSWER_S + turn.think_s
        found.append(moment_s)
    return found


def _of_base(turn: Turn) -> Turn:
    return replace(turn, checks=tuple(replace(check, adapter="") for check in turn.checks))


def _turn(row: dict[str, Any]) -> Turn:
    return Turn(**{**row, "checks": tuple(Check(**check) for check in row.get("checks", ()))})


def _workload(about: dict[str, Any]) -> Workload:
    return Workload(**{**about, "law": Law(about["law"])})


def _tuples(value: Any) -> Any:
    """The value with lists converted back to tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
