"""The simulator on cases computed by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sglang_elora.sim import Calibration, Record, make_engine
from sglang_elora.workloads import CHAT, Check, Session, Trace, Turn

BY_HAND = Calibration(
    name="by hand",
    sources={},
    batch_s=0.010,
    prefill_token_s=1e-4,
    prefill_context_s=0.0,
    decode_step_s=0.005,
    decode_request_s=0.001,
    decode_context_s=0.0,
    link_bytes_per_s=1e6,
    link_latency_s=0.001,
    to_host_bytes_per_s=1e9,
    slot_bytes=1000,
    pool_slots=200,
    host_slots=400,
    adapter_slots=(10,),
    split_slot=10,
    copies_per_adapter=1,
    copies_per_adapter_split=1,
    copies_per_kv_load=2,
    max_running=8,
    prefill_budget=1000,
)
"""An adapter loads in 1 + 10 ms, 50 tokens are computed in 10 + 5 ms."""

ADAPTERS = ["a", "b", "c"]


def session(
    adapter: str, start_s: float, *turns: tuple[int, int, float], num_system: int = 20
) -> Session:
    said = tuple(Turn(range(new), output, think_s) for new, output, think_s in turns)
    return Session(0, adapter, start_s, range(num_system), said)


def play(side: str, calibration: Calibration, *sessions: Session) -> list[Record]:
    numbered = tuple(replace(s, number=i) for i, s in enumerate(sessions))
    return make_engine(side, calibration, ADAPTERS).play(Trace(CHAT, 0, 1.0, 60.0, numbered))


def test_sim_cold_ttft_is_the_longer_of_load_and_prefill() -> None:
    (record,) = play("elora:lru", BY_HAND, session("a", 0.0, (30, 5, 0.0)))
    assert record.was_cold and record.num_cached == 0
    assert record.ttft_s == pytest.approx(0.015)
    assert record.last_s == pytest.approx(0.015 + 4 * 0.006)


def test_sim_cold_ttft_includes_a_slow_load() -> None:
    slow = replace(BY_HAND, link_bytes_per_s=1e5)
    (record,) = play("elora:lru", slow, session("a", 0.0, (30, 5, 0.0)))
    assert record.ttft_s == pytest.approx(0.101)


def test_sim_split_pool_loads_before_the_batch() -> None:
    (record,) = play("stock-tuned:2", BY_HAND, session("a", 0.0, (30, 5, 0.0)))
    assert record.ttft_s == pytest.approx(0.011 + 0.015)


def test_sim_split_with_overlapped_loads_decodes_while_an_adapter_loads() -> None:
    """The second's adapter loads from 32 to 43 ms, while the first one is decoded. Its prefill
    takes until 59 ms, and the first one's last step 7 ms more. A blocking load adds 13 ms."""
    sessions = (session("a", 0.0, (30, 5, 0.0)), session("b", 0.030, (30, 5, 0.0)))
    first, second = play("stock-tuned:2+overlap", BY_HAND, *sessions)
    assert first.last_s == pytest.approx(0.066)
    assert second.first_s == pytest.approx(0.059)
    assert play("stock-tuned:2", BY_HAND, *sessions)[0].last_s == pytest.approx(0.079)


def test_sim_split_with_overlapped_loads_evicts_no_adapter_in_use() -> None:
    sessions = (session("a", 0.0, (30, 5, 0.0)), session("b", 0.030, (30, 5, 0.0)))
    first, second = play("stock-tuned:1+overlap", BY_HAND, *sessions)
    assert first.last_s == pytest.approx(0.050)
    assert second.first_s == pytest.approx(0.050 + 0.026)


@pytest.mark.parametrize("side", ["elora:lru", "elora:elora", "elora:elora_paper", "stock-tuned:2"])
def test_sim_second_turn_hits_the_kv_of_the_first(side: str) -> None:
    """All of 20 + 30 + 5 tokens but the answer's last, which was not computed."""
    talk = session("a", 0.0, (30, 5, 0.0), (10, 2, 1.0))
    first, second = play(side, BY_HAND, talk)
    assert second.due_s == pytest.approx(first.last_s + 1.0)
    assert (second.num_prompt, second.num_cached, second.num_from_host) == (65, 54, 0)
    assert not second.was_cold
    assert second.ttft_s == pytest.approx(0.010 + 11e-4)


def checked(*names: str) -> Session:
    """Two turns with the base model, each checked by these adapters: 4 tokens, 2 of answer."""
    talk = session("", 0.0, (30, 5, 0.0), (10, 2, 1.0))
    checks = tuple(Check(name, range(4), 2) for name in names)
    return replace(talk, turns=tuple(replace(turn, checks=checks) for turn in talk.turns))


@pytest.mark.parametrize(
    ("side", "adapters", "found"),
    [
        ("elora:elora+activated", ("a", "b"), [54, 54, 66, 66]),
        ("elora:elora", ("a", "b"), [0, 0, 54, 54]),
        ("stock-tuned:3", ("a", "b"), [0, 0, 54, 54]),
        ("elora:elora", ("", ""), [54, 54, 66, 66]),
        ("slora", ("a", "b"), [0, 0, 0, 0]),
    ],
)
def test_sim_check_finds_kv_of_the_conversation_that_it_may_use(
    side: str, adapters: tuple[str, str], found: list[int]
) -> None:
    """Of 20 + 30 + 5 tokens all but the last, and 10 + 2 more after the second turn. KV of plain
    adapters is their own, of the turn before."""
    records = play(side, replace(BY_HAND, pool_slots=600), checked(*adapters))
    checks = [record for record in records if record.is_check]
    assert [record.num_prompt for record in checks] == [59, 59, 71, 71]
    assert [record.num_cached for record in checks] == found
    turns = [record for record in records if not record.is_check]
    assert [record.num_cached for record in turns] == ([0, 0] if side == "slora" else [0, 54])
    assert all(check.due_s == turns[check.turn].last_s for check in checks)


def test_sim_adapter_stays_while_its_kv_below_the_conversation_does() -> None:
    """Room for one adapter and a little KV: what a check leaves is evicted before its adapter."""
    calibration = replace(BY_HAND, pool_slots=90)
    engine = make_engine("elora:elora+activated", calibration, ADAPTERS)
    records = engine.play(Trace(CHAT, 0, 1.0, 60.0, (checked("a", "b", "c"),)))
    engine.check_invariants()
    assert len(records) == 8 and engine.num_loads > 3


def test_sim_refuses_checks_for_sides_that_know_the_future() -> None:
    with pytest.raises(ValueError, match="clairvoyant sides know no traces with checks"):
        play("clairvoyant", BY_HAND, checked("a"))


def test_sim_slora_has_no_cache_hits() -> None:
    talk = session("a", 0.0, (30, 5, 0.0), (10, 2, 1.0))
    assert [record.num_cached for record in play("slora", BY_HAND, talk)] == [0, 0]


def test_sim_sessions_of_one_adapter_share_its_system_prompt() -> None:
    sessions = (session("a", 0.0, (30, 5, 0.0)), session("a", 1.0, (30, 5, 0.0)))
    assert [record.num_cached for record in play("elora:lru", BY_HAND, *sessions)] == [0, 20]


def test_sim_sessions_of_two_adapters_share_no_kv() -> None:
    sessions = (session("a", 0.0, (30, 5, 0.0)), session("b", 1.0, (30, 5, 0.0)))
    assert [record.num_cached for record in play("elora:lru", BY_HAND, *sessions)] == [0, 0]


def test_sim_split_pool_without_a_free_slot_delays_the_request() -> None:
    """The first one's answer takes from 26 to 50 ms; then the second's adapter loads."""
    sessions = (session("a", 0.0, (30, 5, 0.0)), session("b", 0.030, (30, 5, 0.0)))
    first, second = play("stock-tuned:1", BY_HAND, *sessions)
    assert first.last_s == pytest.approx(0.050)
    assert second.first_s == pytest.approx(0.050 + 0.026)


def test_sim_offloaded_kv_is_loaded_back_from_the_host() -> None:
    """Three sessions of 100 tokens in 200 slots: the first one's KV is evicted by its second turn,
    with its adapter, and is loaded back in two copies of 104 slots after it."""
    long = (80, 5, 0.0)
    sessions = (
        session("a", 0.0, long, (10, 2, 5.0)),
        session("b", 1.0, long),
        session("c", 2.0, long),
    )
    last = play("elora:lru", BY_HAND, *sessions)[-1]
    assert (last.num_cached, last.num_from_host) == (104, 104)
    assert last.ttft_s == pytest.approx(0.011 + 0.002 + 0.104)
    without = replace(BY_HAND, host_slots=0)
    assert play("elora:lru", without, *sessions)[-1].num_cached == 0


def test_sim_hint_loads_adapter_and_kv_before_the_turn_arrives() -> None:
    """As in the case above; the client announces the second turn one second before it. Another
    session's 104 slots leave for the host then, which takes 0.104 ms."""
    long = (80, 5, 0.0)
    sessions = (
        session("a", 0.0, long, (10, 2, 5.0)),
        session("b", 1.0, long),
        session("c", 2.0, long),
    )
    last = play("elora:lru+sessions+hints", BY_HAND, *sessions)[-1]
    assert (last.num_cached, last.num_from_host, last.was_cold) == (104, 0, False)
    assert last.ttft_s == pytest.approx(0.010 + 11e-4 + 104e-6)


def test_sim_reads_an_adapter_not_on_the_host_from_its_file() -> None:
    """10 slots of 1000 bytes at 100 kB/s, then the load, which hides the computation's 15 ms."""
    files = replace(BY_HAND, adapter_host_slots=20, file_bytes_per_s=1e5)
    (record,) = play("elora:lru", files, session("a", 0.0, (30, 5, 0.0)))
    assert record.ttft_s == pytest.approx(0.100 + 0.015)


def test_sim_refuses_a_session_larger_than_the_pool() -> None:
    with pytest.raises(ValueError, match="session 0 takes 231 slots with its adapter"):
        play("elora:lru", BY_HAND, session("a", 0.0, (200, 1, 0.0)))


@pytest.mark.parametrize(
    ("side", "what"),
    [
        ("stock-tuned:20", "20 adapter slots leave 0 slots"),
        ("elora:fifo", "policy 'fifo' must be"),
        ("elora:lru-recency", "no terms to leave out"),
        ("elora:elora_paper-dependency", "'dependency' is not a valid Term"),
        ("vllm", "side 'vllm' must be"),
    ],
)
def test_sim_refuses_an_unknown_side(side: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        make_engine(side, BY_HAND, ADAPTERS)


def test_calibration_is_saved_loaded_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(asdict(BY_HAND)))
    assert Calibration.load(path) == BY_HAND
    assert BY_HAND.scaled("pool_slots", 0.5).pool_slots == 100
    with pytest.raises(ValueError, match="'name' must be one of"):
        BY_HAND.scaled("name", 2.0)
    path.write_text(json.dumps({**asdict(BY_HAND), "batch_s": -1.0}))
    with pytest.raises(ValueError, match="batch_s of calibration by hand is negative"):
        Calibration.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="missing or unknown: adapter_slots"):
        Calibration.load(path)
