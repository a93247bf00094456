"""A simulated fleet: what each router does, and that no turn is lost."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from sglang_elora.sim import make_engine
from sglang_elora.sim.engine import Engine
from sglang_elora.sim.fleet import Change, Fleet, FleetRecord
from sglang_elora.sim.routers import ROUTERS, Placed
from sglang_elora.workloads import CHAT, CHECKS, Session, Trace, adapter_name, make_trace
from tests.unit.test_sim_cases import BY_HAND

NUM_ADAPTERS, NUM_SERVERS = 24, 4
SERVER = replace(
    BY_HAND,
    pool_slots=6000,
    host_slots=12000,
    adapter_slots=(100, 200),
    link_bytes_per_s=1e8,
    decode_step_s=0.002,
    decode_request_s=1e-4,
)
NAMES = [adapter_name(i) for i in range(NUM_ADAPTERS)]


def trace(seed: int = 0, duration_s: float = 60.0) -> Trace:
    workload = replace(CHAT, num_adapters=NUM_ADAPTERS)
    return make_trace(
        workload, turns_per_s=8.0, duration_s=duration_s, seed=seed, with_tokens=False
    )


def fleet(router: str, num_servers: int = NUM_SERVERS, side: str = "elora:elora") -> Fleet:
    return Fleet(ROUTERS[router](), lambda: make_engine(side, SERVER, NAMES), num_servers)


def answer_one_turn(engine: Engine, session: Session) -> list[float]:
    """Shares of the pool that it holds while it runs."""
    answers: list[int] = []
    engine.on_answer = lambda session, turn, now_s, num_tokens: answers.append(turn)
    engine.send(session, 0, 0.0, len(session.system))
    usages, now_s = [], 0.0
    while not answers:
        engine.run_until(now_s := now_s + 0.01)
        usages.append(engine.usage)
    return usages


def answered(found: list[FleetRecord]) -> Counter[tuple[int, int]]:
    return Counter((one.record.session, one.record.turn) for one in found)


@pytest.mark.parametrize("router", ROUTERS)
def test_each_turn_is_answered_once_and_in_order(router: str) -> None:
    made = fleet(router)
    found = made.play(trace())
    counts = answered(found)
    assert set(counts.values()) == {1} and len(counts) > 300
    turns = defaultdict(list)
    for one in found:
        turns[one.record.session].append(one.record)
    for records in turns.values():
        assert [record.turn for record in records] == list(range(len(records)))
        assert all(a.last_s <= b.due_s for a, b in pairwise(records))
    assert len({one.server for one in found}) == NUM_SERVERS
    for server in made.servers:
        server.engine.check_invariants()
        assert server.engine.num_requests == 0


def test_one_server_behind_a_router_finds_what_it_finds_alone() -> None:
    alone = make_engine("elora:lru", SERVER, NAMES).play(trace())
    behind = [one.record for one in fleet("round-robin", 1, "elora:lru").play(trace())]
    found = [{(r.session, r.turn): r.num_cached for r in records} for records in (alone, behind)]
    assert found[0] == found[1] and sum(found[0].values()) > 10_000


def test_sticky_routers_keep_sessions_and_round_robin_does_not() -> None:
    moved = {}
    for router in ("hash-session", "placed", "round-robin"):
        made = fleet(router)
        num_turns = len(made.play(trace()))
        moved[router] = made.num_moves / num_turns
    assert moved["placed"] < 0.05 and moved["hash-session"] < 0.5
    assert moved["round-robin"] > 0.3


def test_turn_that_moved_finds_what_the_new_server_has_of_its_history() -> None:
    """The middle of the history is another server's: it is computed, not found."""
    made = fleet("round-robin", 2)
    found = made.play(trace())
    for one in found:
        assert one.record.num_cached < one.record.num_prompt
    assert sum(one.record.num_cached for one in found) > 0


@pytest.mark.parametrize("router", ["placed", "hash-adapter", "cache-aware", "prefer-loaded"])
def test_lost_server_loses_no_turn_and_an_added_one_gets_some(router: str) -> None:
    made = fleet(router)
    found = made.play(trace(), [Change(20.0, "lost"), Change(30.0, "added")])
    counts = answered(found)
    assert set(counts.values()) == {1} and len(counts) > 300
    after = {one.server for one in found if one.record.due_s > 20.1}
    assert "server-0" not in after and "server-4" in after


def test_placed_adapters_are_loaded_less_often_than_by_least_load() -> None:
    loads = {}
    for router in ("placed", "least-load"):
        made = fleet(router)
        made.play(trace(duration_s=120.0))
        loads[router] = made.num_loads
        if isinstance(made.router, Placed):
            assert made.router.num_copies >= NUM_ADAPTERS / 2
    assert loads["placed"] < 0.8 * loads["least-load"]


def test_placed_begins_no_session_at_a_full_server_without_the_adapter() -> None:
    made = fleet("placed")
    router, session = made.router, trace().sessions[0]
    assert isinstance(router, Placed)
    (home,) = router.placement.servers_of(session.adapter)
    (full,) = [server for server in made.servers if server.name == home]
    assert router.choose(session, 0, made.servers, None) is full
    full.usage = 1.0
    assert router.choose(session, 0, made.servers, None) is not full
    assert router.choose(session, 1, made.servers, last=full) is full
    answer_one_turn(full.engine, session)
    assert full.engine.has_adapter(session.adapter)
    assert router.choose(session, 0, made.servers, None) is full


def test_share_of_the_pool_that_running_requests_hold() -> None:
    engine = make_engine("elora:elora", SERVER, NAMES)
    assert engine.usage == 0.0
    usages = answer_one_turn(engine, trace().sessions[0])
    assert 0.0 < max(usages) < 1.0 and engine.usage == 0.0


def test_fleet_refuses_checks() -> None:
    checked = make_trace(
        replace(CHECKS, num_adapters=5), turns_per_s=1, duration_s=9, with_tokens=False
    )
    with pytest.raises(ValueError, match="without checks"):
        fleet("placed").play(checked)
