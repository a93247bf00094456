"""Generator of seeded traces of a workload.

A trace starts in a steady state: sessions that began before it exist at time 0, with their history
as one long first turn. Otherwise a trace shorter than a few sessions would be all ramp-up.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from sglang_elora.workloads.popularity import draw
from sglang_elora.workloads.trace import Check, Session, Trace, Turn, due_s
from sglang_elora.workloads.workload import GROWS_AT, Workload

FIRST_TOKEN = 3  # lowest generated token id; special tokens are below
_LEAD_SESSIONS = 3  # generate sessions that start up to this many mean session lives before time 0


def make_trace(
    workload: Workload,
    *,
    turns_per_s: float,
    duration_s: float,
    seed: int = 0,
    with_tokens: bool = True,
) -> Trace:
    """A trace with ``turns_per_s`` turns per second on average, from time 0 on.

    Args:
        with_tokens: If False, tokens are ranges, which take no memory, for callers that need only
            lengths. The lengths then differ, but have the same distribution.
    """
    rng = random.Random(f"{workload.name}/{seed}")
    mean_gap_s = workload.mean_turns / turns_per_s
    shape = workload.start_cv**-2
    start_s = -_LEAD_SESSIONS * workload.mean_life_s
    tokens = draw_tokens if with_tokens else _no_tokens
    sessions: list[Session] = []
    for number in itertools.count():
        if start_s >= duration_s:
            break
        begun = _session(workload, number, start_s, duration_s, rng, tokens)
        if (session := _from_zero(begun, rng)) is not None:
            sessions.append(session)
        start_s += rng.gammavariate(shape, mean_gap_s / shape)
    return Trace(workload, seed, turns_per_s, duration_s, in_order(sessions))


def in_order(sessions: Iterable[Session]) -> tuple[Session, ...]:
    """The sessions sorted and numbered by start."""
    ordered = sorted(sessions, key=lambda session: session.start_s)
    return tuple(replace(session, number=i) for i, session in enumerate(ordered))


def adapter_name(index: int) -> str:
    return f"a{index:03}"


def popular_adapter(
    workload: Workload, time_s: float, duration_s: float, rng: random.Random, number: int = 0
) -> int:
    """Index of the adapter of session ``number``, which starts at ``time_s``."""
    grown = time_s >= GROWS_AT * duration_s
    num_active = max(1, round(workload.active[grown] * workload.num_adapters))
    rank = draw(workload.law, workload.skew, num_active, number, rng)
    moved = math.floor(workload.moves * max(time_s, 0.0) / duration_s)
    return (rank + moved) % workload.num_adapters


def _session(
    workload: Workload,
    number: int,
    start_s: float,
    duration_s: float,
    rng: random.Random,
    tokens: Callable[[random.Random, int, int], Sequence[int]],
) -> Session:
    adapter = popular_adapter(workload, start_s, duration_s, rng, number)
    owner = adapter // (workload.num_checks or 1)  # an application, or the adapter
    own = random.Random(f"system/{workload.name}/{owner}")
    system = tokens(own, own.randint(*workload.system_tokens), workload.vocab_size)
    left = workload.max_tokens - len(system)
    turns: list[Turn] = []
    for i in range(rng.randint(*workload.turns)):
        new = lognormal(rng, workload.user_tokens, workload.user_spread)
        low, high = workload.output_limits
        output = max(low, min(lognormal(rng, workload.output_tokens, workload.output_spread), high))
        scale_s = workload.think_s / workload.think_shape
        think_s = rng.gammavariate(workload.think_shape, scale_s) if i else 0.0
        if new + output > left and turns:
            break
        new = min(new, left - output)
        left -= new + output
        said = tokens(rng, new, workload.vocab_size)
        turns.append(Turn(said, output, think_s, _checks(workload, owner, rng, tokens)))
    name = "" if workload.num_checks else adapter_name(adapter)
    return Session(number, name, start_s, system, tuple(turns))


def _checks(
    workload: Workload,
    application: int,
    rng: random.Random,
    tokens: Callable[[random.Random, int, int], Sequence[int]],
) -> tuple[Check, ...]:
    first = application * workload.num_checks
    return tuple(
        Check(
            adapter_name(index % workload.num_adapters),
            tokens(
                rng,
                lognormal(rng, workload.check_tokens, workload.user_spread),
                workload.vocab_size,
            ),
            workload.check_output,
        )
        for index in range(first, first + workload.num_checks)
    )


def _from_zero(session: Session, rng: random.Random) -> Session | None:
    """The session with its turns before time 0 merged into the first later one; None if there is
    no later one.

    Answers before time 0 become random tokens.
    """
    moments_s = due_s(session)
    first = next((i for i, moment_s in enumerate(moments_s) if moment_s >= 0), None)
    if first is None:
        return None
    turn = session.turns[first]
    opening = replace(turn, new_tokens=_said(session.turns[:first], turn, rng), think_s=0.0)
    turns = (opening, *session.turns[first + 1 :])
    return replace(session, start_s=moments_s[first], turns=turns)


def _said(before: Sequence[Turn], turn: Turn, rng: random.Random) -> Sequence[int]:
    if isinstance(turn.new_tokens, range):
        return range(sum(len(t.new_tokens) + t.num_output for t in before) + len(turn.new_tokens))
    said: list[int] = []
    for earlier in before:
        said += earlier.new_tokens
        said += rng.choices(earlier.new_tokens, k=earlier.num_output)
    return (*said, *turn.new_tokens)


def lognormal(rng: random.Random, mean: float, spread: float) -> int:
    """A random length of at least 1; ``spread`` is the standard deviation of its logarithm."""
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def draw_tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(FIRST_TOKEN, vocab_size), k=count))


def _no_tokens(rng: random.Random, count: int, vocab_size: int) -> Sequence[int]:
    return range(count)
