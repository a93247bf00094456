"""Seeded traces: sessions of one adapter each, that start, say things, think, and come back.

Open-loop in the starts of sessions, closed-loop within one: a turn is sent ``think_s`` after the
answer before it ended. Sizes are those of a tiny model on a CPU; ``Workload`` holds all of them.

A trace begins in the middle of things: sessions that started before it are there at time 0, and
what they said by then comes as one long first turn. Without that, a trace shorter than a few
sessions would be all ramp-up.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peak import Rise

FIRST_TOKEN = 3  # below are the special ones
GROWS_AT = 2 / 3  # of the duration
NOMINAL_ANSWER_S = 0.5  # assumed only to say what a session has done before the trace begins
_LEAD_SESSIONS = 3  # mean session lives before the trace, after which few are left


@dataclass(frozen=True, slots=True)
class Workload:
    """What sessions are like.

    Lengths are lognormal (``*_spread``: standard deviation of the logarithm), thinking times Gamma
    of shape ``think_shape``, gaps between session starts Gamma with coefficient of variation
    ``start_cv``. Popularity is zipf over the ``active`` share of the adapters (before and after
    ``GROWS_AT``), and the ranking moves on by one adapter ``moves`` times per trace.
    """

    name: str
    system_tokens: tuple[int, int]  # shortest and longest, uniform over adapters
    user_tokens: float  # mean
    output_tokens: float  # mean before clipping to output_limits
    turns: tuple[int, int]  # uniform
    think_s: float  # mean
    moves: int
    zipf: float = 1.0
    active: tuple[float, float] = (1.0, 1.0)
    num_adapters: int = 64
    user_spread: float = 0.6
    output_spread: float = 0.5
    output_limits: tuple[int, int] = (8, 32)
    think_shape: float = 2.0
    start_cv: float = 1.5
    max_tokens: int = 2048  # of a session, prompts and answers together
    vocab_size: int = 2048

    @property
    def mean_turns(self) -> float:
        return sum(self.turns) / 2

    def scaled_tokens(self, factor: float) -> Workload:
        """Prompts ``factor`` times as long, for a larger model."""
        low, high = self.system_tokens
        return replace(
            self,
            system_tokens=(round(low * factor), round(high * factor)),
            user_tokens=self.user_tokens * factor,
            max_tokens=round(self.max_tokens * factor),
        )


CHAT = Workload("chat", (60, 180), 110, 14, (4, 8), 20.0, moves=6)
TRANSLATION = Workload(
    "translation", (20, 60), 120, 16, (1, 2), 4.0, moves=32, zipf=0.7, active=(29 / 64, 48 / 64)
)
AGENT = Workload("agent", (300, 600), 70, 12, (6, 12), 8.0, moves=4)
WORKLOADS: Mapping[str, Workload] = {w.name: w for w in (CHAT, TRANSLATION, AGENT)}
TURNS_PER_S: Mapping[str, float] = {"chat": 6.0, "translation": 9.0, "agent": 7.0}
"""What makes stock SGLang, well tuned, take about 200 ms to the first token on two cores."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn adds to its session; it is sent ``think_s`` after the answer before it."""

    new_tokens: tuple[int, ...]
    num_output: int
    think_s: float


@dataclass(frozen=True, slots=True)
class Session:
    number: int
    adapter: str
    start_s: float
    system: tuple[int, ...]  # equal in all sessions of the adapter
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        said = sum(len(turn.new_tokens) + turn.num_output for turn in self.turns)
        return len(self.system) + said

    def tokens_at(self, time_s: float) -> int:
        """Length of its history then, system prompt left out; 0 before its start and when over."""
        moment_s, tokens, last_s = self.start_s, 0, self.start_s
        for turn in self.turns:
            last_s = moment_s = moment_s + turn.think_s
            if moment_s <= time_s:
                tokens += len(turn.new_tokens) + turn.num_output
            moment_s += NOMINAL_ANSWER_S
        return tokens if time_s < last_s else 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Sessions in order of their starts. A turn that is due after ``duration_s`` is not sent."""

    workload: Workload
    seed: int
    turns_per_s: float
    duration_s: float
    sessions: tuple[Session, ...]

    @property
    def num_turns(self) -> int:
        """Turns that are due before the end if answers take ``NOMINAL_ANSWER_S``."""
        return sum(
            moment_s < self.duration_s for session in self.sessions for moment_s in _due(session)
        )

    def live_kv_tokens(self, time_s: float) -> int:
        """KV of all sessions that will come back, with system prompts counted once."""
        lengths = {session: session.tokens_at(time_s) for session in self.sessions}
        alive = {session.adapter: len(session.system) for session, n in lengths.items() if n}
        return sum(lengths.values()) + sum(alive.values())

    @property
    def mean_live_kv_tokens(self) -> float:
        moments = [(0.5 + i) / 20 * self.duration_s for i in range(20)]
        return sum(map(self.live_kv_tokens, moments)) / len(moments)

    def rising(self, low: float, high: float) -> Trace:
        """The same sessions, ever faster: what takes time on the client's side is divided by a
        factor that rises from ``low`` to ``high`` (``peak.Rise``)."""
        rise = Rise(low, high, self.duration_s)
        sessions = tuple(
            replace(
                session,
                start_s=rise.new_time(session.start_s),
                turns=tuple(
                    replace(turn, think_s=turn.think_s / rise.factor(due_s))
                    for turn, due_s in zip(session.turns, _due(session), strict=True)
                ),
            )
            for session in self.sessions
        )
        return replace(self, duration_s=rise.new_duration_s, sessions=sessions)

    def facts(self) -> dict[str, Any]:
        return {
            "workload": asdict(self.workload),
            "seed": self.seed,
            "turns_per_s": self.turns_per_s,
            "duration_s": self.duration_s,
        }

    def save(self, path: Path) -> None:
        """One session a line, behind a line of facts."""
        rows = [self.facts(), *map(asdict, self.sessions)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def load(cls, path: Path) -> Trace:
        facts, *rows = [_tuples(json.loads(line)) for line in path.read_text().splitlines()]
        workload = Workload(**facts.pop("workload"))
        sessions = tuple(
            Session(**{**row, "turns": tuple(Turn(**turn) for turn in row["turns"])})
            for row in rows
        )
        return cls(workload, sessions=sessions, **facts)


def make_trace(
    workload: Workload, *, turns_per_s: float, duration_s: float, seed: int = 0
) -> Trace:
    """``turns_per_s`` on average, from the beginning."""
    rng = random.Random(f"{workload.name}/{seed}")
    mean_gap_s = workload.mean_turns / turns_per_s
    shape = workload.start_cv**-2
    life_s = workload.mean_turns * (workload.think_s + NOMINAL_ANSWER_S)
    start_s = -_LEAD_SESSIONS * life_s
    sessions: list[Session] = []
    while start_s < duration_s:
        session = _from_zero(_session(workload, len(sessions), start_s, duration_s, rng), rng)
        if session is not None:
            sessions.append(session)
        start_s += rng.gammavariate(shape, mean_gap_s / shape)
    sessions.sort(key=lambda session: session.start_s)
    numbered = tuple(replace(session, number=i) for i, session in enumerate(sessions))
    return Trace(workload, seed, turns_per_s, duration_s, numbered)


def adapter_name(index: int) -> str:
    return f"a{index:03}"


def popular_adapter(
    workload: Workload, time_s: float, duration_s: float, rng: random.Random
) -> int:
    """Who is asked for by a session that starts then."""
    grown = time_s >= GROWS_AT * duration_s
    num_active = max(1, round(workload.active[grown] * workload.num_adapters))
    weights = [(1 + rank) ** -workload.zipf for rank in range(num_active)]
    rank = rng.choices(range(num_active), weights)[0]
    moved = math.floor(workload.moves * max(time_s, 0.0) / duration_s)
    return (rank + moved) % workload.num_adapters


def _session(
    workload: Workload, number: int, start_s: float, duration_s: float, rng: random.Random
) -> Session:
    adapter = popular_adapter(workload, start_s, duration_s, rng)
    own = random.Random(f"system/{workload.name}/{adapter}")
    system = _tokens(own, own.randint(*workload.system_tokens), workload.vocab_size)
    left = workload.max_tokens - len(system)
    turns: list[Turn] = []
    for i in range(rng.randint(*workload.turns)):
        new = _length(rng, workload.user_tokens, workload.user_spread)
        low, high = workload.output_limits
        output = max(low, min(_length(rng, workload.output_tokens, workload.output_spread), high))
        scale_s = workload.think_s / workload.think_shape
        think_s = rng.gammavariate(workload.think_shape, scale_s) if i else 0.0
        if new + output > left and turns:
            break
        new = min(new, left - output)
        left -= new + output
        turns.append(Turn(_tokens(rng, new, workload.vocab_size), output, think_s))
    return Session(number, adapter_name(adapter), start_s, system, tuple(turns))


def _from_zero(session: Session, rng: random.Random) -> Session | None:
    """The session with all that came before time 0 in its first turn; None if all of it did.

    Answers that were given by then are random tokens.
    """
    due_s = _due(session)
    first = next((i for i, moment_s in enumerate(due_s) if moment_s >= 0), None)
    if first is None:
        return None
    said: list[int] = []
    for turn in session.turns[:first]:
        said += turn.new_tokens
        said += rng.choices(turn.new_tokens, k=turn.num_output)
    turn = session.turns[first]
    opening = Turn((*said, *turn.new_tokens), turn.num_output, 0.0)
    turns = (opening, *session.turns[first + 1 :])
    return replace(session, start_s=due_s[first], turns=turns)


def _due(session: Session) -> list[float]:
    """When each turn is due if every answer takes ``NOMINAL_ANSWER_S``."""
    moment_s, due_s = session.start_s - NOMINAL_ANSWER_S, []
    for turn in session.turns:
        moment_s += NOMINAL_ANSWER_S + turn.think_s
        due_s.append(moment_s)
    return due_s


def _length(rng: random.Random, mean: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def _tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(FIRST_TOKEN, vocab_size), k=count))


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
