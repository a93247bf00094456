"""The simulator on generated traces: invariants at every step, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.sim import Calibration, Record, make_engine
from sglang_elora.workloads import WORKLOADS, Trace, adapter_name, make_trace

CPU = Calibration.load(Path(__file__).resolve().parents[2] / "benchmarks/sim/cpu.json")
NAMES = [adapter_name(i) for i in range(64)]
SIDES = (
    "stock-default",
    "stock-tuned:8",
    "stock-tuned:8+overlap",
    "elora:lru",
    "elora:gdsf",
    "elora:elora_paper",
    "elora:elora_paper-recency,swap_cost",
    "elora:elora",
    "elora:elora+sessions",
    "elora:elora+sessions+hints",
    "slora",
    "chameleon",
    "clairvoyant",
    "clairvoyant:host",
    "clairvoyant:device",
    "clairvoyant:adapters",
    "clairvoyant+hints",
    "unlimited",
)
EACH_WORKLOAD = pytest.mark.parametrize("workload", WORKLOADS)
EACH_SIDE = pytest.mark.parametrize("side", SIDES)


def trace_of(workload: str, duration_s: float = 40.0) -> Trace:
    return make_trace(
        WORKLOADS[workload], turns_per_s=5.0, duration_s=duration_s, with_tokens=False
    )


def key(record: Record) -> tuple[int, int]:
    return record.session, record.turn


@EACH_SIDE
@EACH_WORKLOAD
def test_sim_completes_every_request_none_before_it_is_due(side: str, workload: str) -> None:
    trace = trace_of(workload)
    records = make_engine(side, CPU, NAMES).play(trace)
    assert len({key(record) for record in records}) == len(records)
    last = {record.session: record for record in sorted(records, key=key)}
    begun = (session for session in trace.sessions if session.start_s < trace.duration_s)
    assert set(last) == {session.number for session in begun}
    for number, record in last.items():
        following = trace.sessions[number].turns[record.turn + 1 :]
        assert not following or record.last_s + following[0].think_s >= trace.duration_s
    for record in records:
        least_s = CPU.batch_s + CPU.prefill_s(
            record.num_prompt - record.num_cached, record.num_cached
        )
        assert record.due_s + least_s <= record.first_s + 1e-9
        assert record.num_from_host <= record.num_cached < record.num_prompt


@pytest.mark.parametrize(
    "side", [side for side in SIDES if not side.startswith(("stock", "unlimited"))]
)
@pytest.mark.parametrize("pool_slots", [5000, 14336])
def test_sim_pool_is_never_overfull_nor_kv_without_its_adapter(side: str, pool_slots: int) -> None:
    engine = make_engine(side, replace(CPU, pool_slots=pool_slots, host_slots=6000), NAMES)
    residence: Any = engine._residence
    step, num_checked = residence.step, 0

    def checked(now_s: float, waiting: Sequence[Any], *, is_busy: bool) -> None:
        nonlocal num_checked
        num_checked += 1
        if num_checked % 5 == 0:
            engine.check_invariants()
        step(now_s, waiting, is_busy=is_busy)

    residence.step = checked
    engine.play(trace_of("agent", 15.0))
    engine.check_invariants()
    assert engine.reserved() == 0 and num_checked > 100


@EACH_WORKLOAD
@pytest.mark.parametrize("seed", [0, 1])
def test_clairvoyant_policy_saves_at_least_as_much_as_lru(workload: str, seed: int) -> None:
    trace = make_trace(WORKLOADS[workload], turns_per_s=5.0, duration_s=75.0, seed=seed)
    values = {}
    for side in ("elora:lru", "clairvoyant"):
        engine = make_engine(side, CPU, NAMES)
        records = engine.play(trace)
        saved_s = sum(CPU.prefill_s(record.num_cached, 0) for record in records)
        values[side] = saved_s - CPU.to_device_s(engine.slots_to_device, 0)
    assert values["clairvoyant"] >= values["elora:lru"]


@pytest.mark.parametrize("side", ["stock-tuned:8", "elora:elora", "clairvoyant"])
def test_sim_is_deterministic(side: str) -> None:
    runs = [make_engine(side, CPU, NAMES).play(trace_of("chat")) for _ in range(2)]
    assert runs[0] == runs[1]


def test_sim_of_a_faster_machine_is_not_slower() -> None:
    def mean_latency_s(calibration: Calibration) -> float:
        records = make_engine("elora:elora", calibration, NAMES).play(trace_of("chat"))
        return sum(record.last_s - record.due_s for record in records) / len(records)

    for name in ("batch_s", "prefill_token_s", "decode_step_s"):
        assert mean_latency_s(CPU.scaled(name, 0.5)) < 0.95 * mean_latency_s(CPU)


def test_sim_forgets_sessions_when_they_end() -> None:
    trace = trace_of("chat")
    engine = make_engine("elora:elora+sessions", CPU, NAMES)
    turns = {record.session: record.turn + 1 for record in engine.play(trace)}
    alive = sum(n < len(trace.sessions[number].turns) for number, n in turns.items())
    assert 0 < alive < len(turns)
    assert len(engine._cache.sessions) == alive


@pytest.mark.parametrize("seed", [0, 1])
def test_sim_with_session_ids_has_more_cache_hits(seed: int) -> None:
    trace = make_trace(
        WORKLOADS["chat"], turns_per_s=6.0, duration_s=120.0, seed=seed, with_tokens=False
    )
    found = {}
    for side in ("elora:elora", "elora:elora+sessions"):
        records = make_engine(side, CPU, NAMES).play(trace)
        found[side] = sum(r.num_cached for r in records) / sum(r.num_prompt for r in records)
    assert found["elora:elora+sessions"] > found["elora:elora"] + 0.02
