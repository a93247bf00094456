"""Session state of cache entries, on the server's own tree."""

from __future__ import annotations

from typing import Any

from sglang_elora.policy import SessionState
from sglang_elora.tree import namespace_of
from tests.harness.swapper_world import SwapperWorld, adapter_id

UNKNOWN, ALIVE, OVER, BEGINNING = SessionState
SLOTS = 64
SYSTEM = [1, 2, 3, 4]


def world(policy: str = "elora") -> SwapperWorld:
    made = SwapperWorld(8 * SLOTS, num_adapters=4, adapter_slots=SLOTS, policy=policy)
    made.arrive(adapter_id(0))
    made.step()
    made.waiting.clear()
    made.step()
    return made


def end_of(made: SwapperWorld, tokens: list[int]) -> Any:
    found = made.cache.match(tokens, namespace_of(adapter_id(0)))
    return made.core.node_by_id(found.last_device_node)


def turn(made: SwapperWorld, session: str, tokens: list[int]) -> None:
    made.cache_kv(adapter_id(0), tokens)
    made.core.sessions.turn(session, end_of(made, tokens))


def expected(made: SwapperWorld, tokens: list[int]) -> list[SessionState]:
    """From the adapter down."""
    path = made.core.path_of(end_of(made, tokens))
    return [node.entry.session_state for node in reversed(path)]


def test_shared_kv_is_alive_while_any_of_its_sessions_is() -> None:
    made = world()
    first, second = [*SYSTEM, 5, 6], [*SYSTEM, 7, 8, 9]
    turn(made, "a", first)
    assert expected(made, first) == [ALIVE, ALIVE]
    turn(made, "b", second)  # splits what the first has
    assert expected(made, first) == expected(made, second) == [ALIVE, ALIVE, ALIVE]
    made.core.sessions.over("a")
    assert expected(made, first) == [ALIVE, ALIVE, OVER]
    made.core.sessions.over("b")
    assert expected(made, second) == [UNKNOWN, UNKNOWN, OVER], "others may begin so as well"
    made.core.sessions.over("never-heard-of")
    assert len(made.core.sessions) == 0
    made.check()


def test_first_turn_kv_is_classed_as_beginning() -> None:
    made = world()
    turn(made, "a", SYSTEM)
    turn(made, "a", [*SYSTEM, 5, 6])
    made.core.sessions.over("a")
    assert expected(made, [*SYSTEM, 5, 6]) == [UNKNOWN, BEGINNING, OVER]
    made.cache_kv(adapter_id(0), [1, 2, 9])  # of a request without a session
    assert expected(made, [*SYSTEM, 5, 6]) == [UNKNOWN, BEGINNING, OVER, OVER]
    made.check()


def test_session_holds_only_the_kv_of_its_last_turn() -> None:
    made = world()
    turn(made, "a", SYSTEM)
    turn(made, "a", [*SYSTEM, 5, 6])
    assert expected(made, [*SYSTEM, 5, 6]) == [ALIVE, ALIVE, ALIVE]
    turn(made, "a", [*SYSTEM, 9])  # the client retracted a turn
    assert expected(made, [*SYSTEM, 5, 6]) == [ALIVE, ALIVE, OVER]
    made.check()


def test_session_survives_eviction_and_reset() -> None:
    made = world()
    turn(made, "a", [*SYSTEM, 5])
    made.cache.evict(5)
    turn(made, "b", [*SYSTEM, 6])
    made.core.sessions.over("a")
    assert expected(made, [*SYSTEM, 6]) == [ALIVE, ALIVE]
    made.cache.tree.reset()
    assert made.residency.adapter_table.get(adapter_id(0)).entry.session_state == UNKNOWN
    made.core.sessions.over("b")
    made.check()


def test_kv_of_ended_sessions_is_evicted_before_live_kv_of_equal_age() -> None:
    """A live session continues; an ended one has no further turns."""
    made = world()
    made.residency.pin(adapter_id(0))
    room = made.cache.allocator.available_size()
    for i in range(400):
        name, tokens = f"s{i}", [1000 + i]
        turn(made, name, tokens)
        made.core.visit(end_of(made, tokens).id)
        made.core.sessions.over(name)
    made.swapper.prepare()
    made.cache.evict(room)
    for i in range(room):
        turn(made, f"x{i}", [5000 + i])
    for i in range(room // 2, room):  # the younger half
        made.core.sessions.over(f"x{i}")
    made.cache.evict(room // 4)
    alive = sum(len(end_of(made, [5000 + i]).key) for i in range(room // 2))
    assert alive == room // 2, "none of the older, living ones went"
    made.check()


def test_session_marks_do_not_break_policies_without_sessions() -> None:
    for policy in ("lru", "gdsf", "elora_paper"):
        made = world(policy)
        turn(made, "a", [*SYSTEM, 5])
        turn(made, "b", [*SYSTEM, 6])
        made.core.sessions.over("a")
        made.cache.evict(3)
        made.check()
