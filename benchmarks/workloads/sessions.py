"""Seeded traces of people who talk to adapters: who starts when, says what, and comes back when.

A session belongs to one adapter for its life. All sessions of an adapter begin with its system
prompt. A turn is sent when its user has thought, after the answer to the turn before; so a trace is
open in the starts of sessions and closed within one.

Popularity is zipf over a ranking that rotates as time passes, and over a set of adapters that may
grow at two thirds of the trace, as in the Azure Functions trace the paper uses (29 to 48).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FIRST_TOKEN = 3  # below are the special ones
GROWS_AT = 2 / 3  # of the duration


@dataclass(frozen=True, slots=True)
class Kind:
    """What sessions of a workload are like. Tokens and seconds are means, pairs are ranges.

    Lengths are lognormal with ``spread`` as the standard deviation of the logarithm, thinking is
    Gamma of shape ``think_shape``, starts of sessions are Gamma with coefficient of variation
    ``start_cv``.
    """

    name: str
    system_tokens: tuple[int, int]
    user_tokens: float
    output_tokens: float
    turns: tuple[int, int]
    think_s: float
    num_adapters: int = 64
    active: tuple[float, float] = (1.0, 1.0)  # share of adapters before and after GROWS_AT
    zipf: float = 1.0
    rotate_s: float = math.inf  # after which the ranking has moved by one
    spread: float = 0.6
    think_shape: float = 2.0
    start_cv: float = 1.5
    max_tokens: int = 3000  # of a session


CHAT = Kind("chat", (80, 240), 70, 24, (3, 8), 6.0, zipf=0.9, rotate_s=20)
TRANSLATION = Kind(
    "translation",
    (20, 60),
    90,
    24,
    (1, 2),
    3.0,
    active=(29 / 64, 48 / 64),
    zipf=0.7,
    rotate_s=4,
)
AGENT = Kind("agent", (250, 500), 50, 16, (5, 12), 2.5, zipf=1.0, rotate_s=30)
KINDS = {kind.name: kind for kind in (CHAT, TRANSLATION, AGENT)}


@dataclass(frozen=True, slots=True)
class Turn:
    """``think_s`` passes between the answer before and this turn."""

    new_tokens: tuple[int, ...]
    num_output: int
    think_s: float


@dataclass(frozen=True, slots=True)
class Session:
    number: int
    start_s: float
    adapter: int
    system: tuple[int, ...]
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        said = sum(len(turn.new_tokens) + turn.num_output for turn in self.turns)
        return len(self.system) + said


@dataclass(frozen=True, slots=True)
class Trace:
    """Sessions in order of their starts, all of which are before ``duration_s``."""

    kind: str
    seed: int
    duration_s: float
    sessions: tuple[Session, ...]

    @property
    def num_turns(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    def scaled(self, factor: float) -> Trace:
        """The same people, ``factor`` times as fast."""
        sessions = tuple(
            replace(
                session,
                start_s=session.start_s / factor,
                turns=tuple(replace(turn, think_s=turn.think_s / factor) for turn in session.turns),
            )
            for session in self.sessions
        )
        return replace(self, duration_s=self.duration_s / factor, sessions=sessions)

    def save(self, path: Path) -> None:
        """One session per line, behind a line of facts."""
        facts = {"kind": self.kind, "seed": self.seed, "duration_s": self.duration_s}
        lines = [json.dumps(row) for row in (facts, *map(asdict, self.sessions))]
        path.write_text("\n".join(lines) + "\n")

    @staticmethod
    def load(path: Path) -> Trace:
        first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        return Trace(**first, sessions=tuple(map(_session_of, rows)))


def make_trace(
    kind: Kind, *, turns_per_s: float, duration_s: float, seed: int = 0, vocab_size: int = 2048
) -> Trace:
    """Sessions whose turns come to ``turns_per_s`` on average."""
    rng = random.Random(f"{kind.name}/{seed}")
    mean_gap_s = (sum(kind.turns) / 2) / turns_per_s
    shape = 1 / kind.start_cv**2
    sessions: list[Session] = []
    start_s = rng.random() * mean_gap_s
    while start_s < duration_s:
        sessions.append(_make_session(kind, len(sessions), start_s, duration_s, rng, vocab_size))
        start_s += rng.gammavariate(shape, mean_gap_s / shape)
    return Trace(kind.name, seed, duration_s, tuple(sessions))


def adapter_at(kind: Kind, time_s: float, duration_s: float, rng: random.Random) -> int:
    """Who is asked for at that moment."""
    share = kind.active[time_s >= GROWS_AT * duration_s]
    active = max(1, round(share * kind.num_adapters))
    weights = [1 / (1 + rank) ** kind.zipf for rank in range(active)]
    rank = rng.choices(range(active), weights)[0]
    return (rank + int(time_s / kind.rotate_s)) % kind.num_adapters


def _make_session(
    kind: Kind, number: int, start_s: float, duration_s: float, rng: random.Random, vocab_size: int
) -> Session:
    adapter = adapter_at(kind, start_s, duration_s, rng)
    own = random.Random(f"system/{kind.name}/{adapter}")
    system = _tokens(own, own.randint(*kind.system_tokens), vocab_size)
    left = kind.max_tokens - len(system)
    turns = []
    for i in range(rng.randint(*kind.turns)):
        new = _length(rng, kind.user_tokens, kind.spread)
        output = min(_length(rng, kind.output_tokens, kind.spread), 4 * int(kind.output_tokens))
        think_s = rng.gammavariate(kind.think_shape, kind.think_s / kind.think_shape) if i else 0.0
        left -= new + output
        if left < 0 and turns:
            break
        turns.append(Turn(_tokens(rng, new, vocab_size), output, think_s))
    return Session(number, start_s, adapter, system, tuple(turns))


def _length(rng: random.Random, mean: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def _tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(FIRST_TOKEN, vocab_size), k=count))


def _session_of(row: dict[str, object]) -> Session:
    turns: Sequence[dict[str, object]] = row.pop("turns")  # type: ignore[assignment]
    row["system"] = tuple(row["system"])  # type: ignore[arg-type]
    parsed = tuple(Turn(tuple(t.pop("new_tokens")), **t) for t in turns)  # type: ignore[arg-type]
    return Session(**row, turns=parsed)  # type: ignore[arg-type]
