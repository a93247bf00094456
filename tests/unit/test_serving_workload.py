"""Traces of the serving benchmark: reproducible, scalable, and with the drift they promise."""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/serving"))

from peak import largest_factor
from workload import (
    AGENT,
    CHAT,
    GROWS_AT,
    TRANSLATION,
    WORKLOADS,
    Session,
    Trace,
    Turn,
    Workload,
    make_trace,
    popular_adapter,
)

EACH = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


def short(workload: Workload, seed: int = 0) -> Trace:
    return make_trace(workload, turns_per_s=4, duration_s=60, seed=seed)


@EACH
def test_same_seed_same_trace(workload: Workload) -> None:
    assert short(workload) == short(workload)
    assert short(workload) != short(workload, seed=1)


@EACH
def test_jsonl_round_trip(workload: Workload, tmp_path: Path) -> None:
    trace = short(workload)
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl") == trace


@EACH
def test_faster_divides_times_and_nothing_else(workload: Workload) -> None:
    trace = short(workload)
    twice = trace.faster(2)
    assert (twice.duration_s, twice.turns_per_s) == (30, 8)
    for slow, fast in zip(trace.sessions, twice.sessions, strict=True):
        assert fast.start_s == slow.start_s / 2
        assert [t.think_s for t in fast.turns] == [t.think_s / 2 for t in slow.turns]
        assert replace(fast, start_s=0, turns=()) == replace(slow, start_s=0, turns=())
        assert [t.new_tokens for t in fast.turns] == [t.new_tokens for t in slow.turns]
    assert twice.faster(0.5) == trace


@EACH
def test_lengths_and_order(workload: Workload) -> None:
    trace = short(workload)
    starts = [session.start_s for session in trace.sessions]
    assert starts == sorted(starts)
    assert [session.number for session in trace.sessions] == list(range(len(starts)))
    assert 0 <= starts[0] and starts[-1] < trace.duration_s
    low, high = workload.output_limits
    for session in trace.sessions:
        assert session.num_tokens <= workload.max_tokens
        assert session.turns[0].think_s == 0
        assert len(session.turns) <= workload.turns[1]
        assert all(low <= turn.num_output <= high for turn in session.turns)


@EACH
def test_sessions_of_an_adapter_share_its_system_prompt(workload: Workload) -> None:
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for seed in range(2):
        for session in short(workload, seed).sessions:
            prompts.setdefault(session.adapter, set()).add(session.system)
    assert all(len(found) == 1 for found in prompts.values())
    assert len(set.union(*prompts.values())) == len(prompts)


@EACH
def test_rate_holds_from_the_beginning(workload: Workload) -> None:
    halves = [0, 0]
    for seed in range(8):
        trace = short(workload, seed)
        for session in trace.sessions:
            moment_s = session.start_s
            for turn in session.turns:
                moment_s += turn.think_s
                if moment_s < trace.duration_s:
                    halves[moment_s >= trace.duration_s / 2] += 1
                moment_s += 0.5
    assert [turns / (8 * 30) for turns in halves] == pytest.approx([4, 4], rel=0.25)


def shares(workload: Workload, time_s: float) -> Counter[int]:
    rng = random.Random(0)
    return Counter(popular_adapter(workload, time_s, 60, rng) for _ in range(4000))


@EACH
def test_zipf_with_a_ranking_that_moves(workload: Workload) -> None:
    early, late = shares(workload, 0), shares(workload, 59)
    assert early.most_common(1)[0][0] == 0
    moved = int(workload.moves * 59 / 60)
    assert late.most_common(1)[0][0] == moved
    assert early[0] / early[3] == pytest.approx(4**workload.zipf, rel=0.3)


def test_active_set_grows_at_two_thirds() -> None:
    still = replace(TRANSLATION, moves=0, zipf=0.1)
    assert len(shares(still, 60 * GROWS_AT - 0.1)) == 29
    assert len(shares(still, 60 * GROWS_AT)) == 48
    assert len(shares(replace(CHAT, zipf=0.1), 0)) == 64


def test_session_before_the_trace_opens_with_what_it_said() -> None:
    """Agents live longer than a second, so most sessions of such a trace began before it."""
    trace = make_trace(AGENT, turns_per_s=4, duration_s=1, seed=0)
    longest = max(len(session.turns[0].new_tokens) for session in trace.sessions)
    assert longest > 4 * AGENT.user_tokens


def test_live_kv_counts_who_comes_back() -> None:
    """Two sessions of one adapter: history of each while it lasts, system prompt once."""
    talk = (Turn((5,) * 10, 2, 0.0), Turn((6,) * 20, 3, 4.5))
    sessions = tuple(Session(i, "a000", float(i), (9,) * 7, talk) for i in range(2))
    trace = Trace(CHAT, 0, 1.0, 60.0, sessions)
    assert [trace.live_kv_tokens(t) for t in (0, 1, 4.9, 5, 6)] == [19, 31, 31, 19, 0]
    assert trace.num_turns == 4


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.4, None), (9, 4), (1.0, 1.0), (1.5, 2**0.5), (2.9, 8**0.5)]
)
def test_peak_by_bisection(limit: float, expected: float | None) -> None:
    """Three octaves in three halvings: the answer is at most 3/8 of an octave too low."""
    calls: list[float] = []

    def bears(factor: float) -> bool:
        calls.append(factor)
        return factor <= limit * 1.0001

    found = largest_factor(bears, 0.5, 4.0, 3)
    assert found == (None if expected is None else pytest.approx(expected, rel=0.25))
    assert found is None or found <= limit * 1.0001
    assert len(calls) <= 5
