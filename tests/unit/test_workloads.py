"""Traces of the serving benchmark: reproducible, scalable, and with the drift they promise."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_elora.bench.peak import peak_factor
from sglang_elora.workloads import (
    AGENT,
    CHAT,
    CHECKS,
    GROWS_AT,
    TRANSLATION,
    WORKLOADS,
    Rise,
    Session,
    Trace,
    Turn,
    Workload,
    adapter_name,
    make_trace,
    popular_adapter,
)

EACH = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


def short(workload: Workload, seed: int = 0) -> Trace:
    return make_trace(workload, turns_per_s=4, duration_s=60, seed=seed)


@EACH
def test_workload_trace_is_determined_by_its_seed(workload: Workload) -> None:
    assert short(workload) == short(workload)
    assert short(workload) != short(workload, seed=1)


@EACH
def test_trace_jsonl_round_trip(workload: Workload, tmp_path: Path) -> None:
    trace = short(workload)
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl") == trace


@EACH
def test_rising_trace_has_the_same_sessions_at_growing_rate(workload: Workload) -> None:
    trace = short(workload)
    fast = trace.rising(0.5, 2.0)
    rise = Rise(0.5, 2.0, trace.duration_s)
    assert fast.duration_s == pytest.approx(rise.new_time(60)) == pytest.approx(64.92, abs=0.01)
    for old, new in zip(trace.sessions, fast.sessions, strict=True):
        assert new.start_s == pytest.approx(rise.new_time(old.start_s))
        assert replace(new, start_s=0, turns=()) == replace(old, start_s=0, turns=())
        for before, after in zip(old.turns, new.turns, strict=True):
            assert before.think_s / 2.0 <= after.think_s <= before.think_s / 0.5
            assert replace(after, think_s=0) == replace(before, think_s=0)


def test_rise_factor_equals_hand_computed_values() -> None:
    """From 1/2 to 2 in 60 s: 1 in the middle, which the new trace reaches after 43.28 s."""
    rise = Rise(0.5, 2.0, 60.0)
    assert [rise.factor(t) for t in (0, 30, 60, 90)] == pytest.approx([0.5, 1, 2, 2])
    assert rise.new_time(30) == pytest.approx(60 / 2 / math.log(2), abs=0.01)
    assert [rise.share_at(rise.new_time(t)) for t in (0, 30, 60)] == pytest.approx([0, 0.5, 1])
    assert [rise.factor_behind(share) for share in (0, 0.5, 1)] == pytest.approx([0.5, 1, 2])
    with pytest.raises(ValueError, match="low < high"):
        Rise(2.0, 1.0, 60.0)


@EACH
def test_workload_lengths_are_in_range_and_sessions_ordered(workload: Workload) -> None:
    trace = short(workload)
    starts = [session.start_s for session in trace.sessions]
    assert starts == sorted(starts)
    assert [session.number for session in trace.sessions] == list(range(len(starts)))
    assert starts[0] >= 0 and starts[-1] < trace.duration_s
    low, high = workload.output_limits
    for session in trace.sessions:
        assert session.num_tokens <= workload.max_tokens
        assert session.turns[0].think_s == 0
        assert len(session.turns) <= workload.turns[1]
        assert all(low <= turn.num_output <= high for turn in session.turns)


@EACH
def test_workload_sessions_of_an_adapter_share_its_system_prompt(workload: Workload) -> None:
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for seed in range(2):
        for session in short(workload, seed).sessions:
            prompts.setdefault(session.adapter, set()).add(session.system)
    assert all(len(found) == 1 for found in prompts.values())
    assert len(set.union(*prompts.values())) == len(prompts)


@EACH
def test_workload_rate_is_constant_from_the_start(workload: Workload) -> None:
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
def test_workload_popularity_is_zipf_over_a_moving_ranking(workload: Workload) -> None:
    early, late = shares(workload, 0), shares(workload, 59)
    assert early.most_common(1)[0][0] == 0
    moved = int(workload.moves * 59 / 60)
    assert late.most_common(1)[0][0] == moved
    assert early[0] / early[3] == pytest.approx(4**workload.skew, rel=0.3)


def test_workload_active_set_grows_at_two_thirds() -> None:
    still = replace(TRANSLATION, moves=0, skew=0.1)
    assert len(shares(still, 60 * GROWS_AT - 0.1)) == 29
    assert len(shares(still, 60 * GROWS_AT)) == 48
    assert len(shares(replace(CHAT, skew=0.1), 0)) == 64


def test_session_begun_before_the_trace_opens_with_its_history() -> None:
    """Agents live longer than a second, so most sessions of such a trace began before it."""
    trace = make_trace(AGENT, turns_per_s=4, duration_s=1, seed=0)
    longest = max(len(session.turns[0].new_tokens) for session in trace.sessions)
    assert longest > 4 * AGENT.user_tokens


def test_live_kv_counts_sessions_that_will_return() -> None:
    """Two sessions of one adapter: history of each while it lasts, system prompt once."""
    talk = (Turn((5,) * 10, 2, 0.0), Turn((6,) * 20, 3, 4.5))
    sessions = tuple(Session(i, "a000", float(i), (9,) * 7, talk) for i in range(2))
    trace = Trace(CHAT, 0, 1.0, 60.0, sessions)
    assert [trace.live_kv_tokens(t) for t in (0, 1, 4.9, 5, 6)] == [19, 31, 31, 19, 0]
    assert trace.num_turns == 4


def test_peak_factor_is_the_rate_after_the_last_window_within_the_limit() -> None:
    """From half to twice the rate in four windows: up to 0.71, 1, 1.41 and 2."""
    rise = Rise(0.5, 2.0, 60.0)
    when = [rise.new_time(60.0 * (i + 0.5) / 4) for i in range(4)]
    slow_at_first = list(zip(when, (0.9, 0.1, 0.3, 3.0), strict=True))
    assert peak_factor(slow_at_first, rise, 0.5, 4) == pytest.approx(2**0.5)
    failed = [*slow_at_first[:2], (when[2], math.inf)]
    assert peak_factor(failed, rise, 0.5, 4) == pytest.approx(1.0)
    assert peak_factor(slow_at_first[:1], rise, 0.5, 4) is None
    late = [(rise.new_duration_s + 5, 0.1)]  # a session's last turn
    assert peak_factor(late, rise, 0.5, 4) == pytest.approx(2.0)


def test_checked_workload_asks_the_adapters_of_an_application_after_each_turn(
    tmp_path: Path,
) -> None:
    trace = make_trace(replace(CHECKS, num_adapters=20), turns_per_s=4.0, duration_s=60.0)
    asked: dict[Sequence[int], set[tuple[str, ...]]] = {}
    for session in trace.sessions:
        assert session.adapter == "" and session.num_tokens <= CHECKS.max_tokens
        for turn in session.turns:
            asked.setdefault(session.system, set()).add(tuple(c.adapter for c in turn.checks))
            assert all(check.num_output == 8 and check.new_tokens for check in turn.checks)
    assert len(asked) == 4, "20 adapters are those of 4 applications"
    assert sorted(name for (names,) in asked.values() for name in names) == [
        adapter_name(i) for i in range(20)
    ]
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl") == trace
    turns = [turn for s in trace.without_adapters().sessions for turn in s.turns]
    assert {check.adapter for turn in turns for check in turn.checks} == {""}
