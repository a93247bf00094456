"""Orders of the controller of a fleet, from the states of its servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_elora.fleet import Controller, Order, preference
from sglang_elora.fleet.controller import IDLE_S, MISSES, MOST_NAMES

SERVERS = ("http://one", "http://two", "http://three")


def row(name: str, **fields: Any) -> dict[str, Any]:
    """An adapter that has never been used, as ``/elora/state`` has it."""
    return {
        "lora_name": name,
        "tier": "disk",
        "visits": 0,
        "computed_tokens": 0,
        "generated_tokens": 0,
        "num_requests": 0,
        "idle_s": None,
        "pinned": False,
        **fields,
    }


def state(*rows: Mapping[str, Any]) -> dict[str, Any]:
    return {"adapters": list(rows)}


def home(name: str) -> str:
    return preference(name, SERVERS)[0]


def by_server(orders: list[Order], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for order in orders:
        if order.what == what:
            assert order.server not in found
            found[order.server] = order.body["lora_name"]
    return found


def test_each_server_reads_the_files_of_its_own_adapters_first_and_once() -> None:
    names = [f"a{i}" for i in range(60)]
    states = {server: state(*map(row, names)) for server in SERVERS}
    controller = Controller(SERVERS, 0.0)
    reads = by_server(controller.round(states, 0.0), "prefetch")
    assert sorted(name for of_server in reads.values() for name in of_server) == sorted(names)
    assert all(home(name) == server for server in reads for name in reads[server])
    assert controller.round(states, 5.0) == []


def test_long_reads_are_ordered_in_parts_of_which_the_first_is_sent_last() -> None:
    names = [f"a{i:04}" for i in range(2 * MOST_NAMES + 1)]
    orders = Controller(SERVERS[:1], 0.0).round({SERVERS[0]: state(*map(row, names))}, 0.0)
    assert [len(order.body["lora_name"]) for order in orders] == [1, MOST_NAMES, MOST_NAMES]
    assert orders[-1].body["lora_name"][0] == names[0]
    assert all(order.body["tier"] == "host" for order in orders)


def busy(name: str, visits: int, **fields: Any) -> dict[str, Any]:
    fields = {"tier": "device", "idle_s": 0.0, **fields}
    tokens = {"computed_tokens": 200 * visits, "generated_tokens": 100 * visits}
    return row(name, visits=visits, **tokens, **fields)


def test_busy_adapter_is_pinned_with_a_lease_on_further_servers_and_says_why() -> None:
    controller = Controller(SERVERS, 0.0)
    idle = {server: state(row("hot", tier="host")) for server in SERVERS[1:]}
    controller.round({SERVERS[0]: state(busy("hot", 0)), **idle}, 0.0)
    orders = controller.round({SERVERS[0]: state(busy("hot", 100)), **idle}, 5.0)
    assert {order.server for order in orders} == set(SERVERS[1:])
    for order in orders:
        assert order.what == "pin" and order.body["lease_s"] > 5.0
        assert "of a server's load on 3" in str(order) and order.server in str(order)
    assert set(controller.placement.servers_of("hot")) == set(SERVERS)


def test_only_copy_of_an_adapter_is_loaded_without_a_pin_and_a_pinned_one_is_left() -> None:
    for pinned in (False, True):
        controller = Controller(SERVERS, 0.0)
        place = home("one")
        other = next(server for server in SERVERS if server != place)
        for visits in (0, 1):
            rows = {server: [row("one", tier="host", pinned=pinned)] for server in SERVERS}
            if visits:  # a router has sent its first request to a server that is not its home
                rows[other] = [busy("one", visits)]
            for server in SERVERS:  # the load of the others, so that one copy is enough
                rows[server] += [busy(f"{server}-{i}", 100 * visits) for i in range(4)]
            states = {server: state(*rows[server]) for server in SERVERS}
            orders = controller.round(states, 5.0 * visits)
        of_one = [order for order in orders if order.body["lora_name"] == "one"]
        assert all(order.what == "prefetch" for order in of_one)
        assert len(of_one) == (not pinned)


def test_started_again_the_controller_keeps_what_servers_have() -> None:
    names = [f"a{i}" for i in range(30)]
    places = {name: SERVERS[i % 3] for i, name in enumerate(names)}

    def states(visits: int) -> dict[str, Any]:
        return {
            server: state(
                *(busy(n, visits) if places[n] == server else row(n, tier="host") for n in names)
            )
            for server in SERVERS
        }

    controller = Controller(SERVERS, 0.0)
    assert controller.round(states(0), 0.0) == []
    orders = controller.round(states(10), 5.0)
    assert orders == []
    assert all(places[name] in controller.placement.servers_of(name) for name in names)


def test_copy_that_is_not_wanted_is_evicted_only_when_idle() -> None:
    name = "cold"
    first, second, _ = preference(name, SERVERS)
    for idle_s, num_requests, pinned, evicted in (
        (IDLE_S, 0, False, True),
        (IDLE_S - 1, 0, False, False),
        (IDLE_S, 1, False, False),
        (IDLE_S, 0, True, False),
    ):
        controller = Controller(SERVERS, 0.0)
        rest = {server: state(row(name, tier="host")) for server in SERVERS}
        for visits, idle in ((1, 0.0), (50, 0.0), (99, idle_s)):  # idle only some rounds later
            extra = row(name, tier="device", idle_s=idle, num_requests=num_requests, pinned=pinned)
            orders = controller.round(
                {**rest, second: state(extra, busy("other", visits))}, float(visits)
            )
            assert not by_server(orders, "evict") or idle
        assert (by_server(orders, "evict") == {second: name}) == evicted
        assert first in controller.placement.servers_of(name)


def test_lost_server_is_left_out_after_some_rounds_and_comes_back() -> None:
    controller = Controller(SERVERS, 0.0)
    names = [f"a{i}" for i in range(30)]
    states: dict[str, Any] = {server: state(*map(row, names)) for server in SERVERS}
    controller.round(states, 0.0)
    lost = {**states, SERVERS[0]: None}
    for i in range(1, MISSES):
        assert controller.round(lost, 5.0 * i) == []
    orders = controller.round(lost, 5.0 * MISSES)
    moved = [name for of_server in by_server(orders, "prefetch").values() for name in of_server]
    assert sorted(moved) == sorted(name for name in names if home(name) == SERVERS[0])
    assert SERVERS[0] not in {order.server for order in orders}
    back = by_server(controller.round(states, 20.0), "prefetch")
    assert back == {SERVERS[0]: [name for name in names if home(name) == SERVERS[0]]}


def test_counts_that_begin_again_are_no_work() -> None:
    controller = Controller(SERVERS[:1], 0.0)
    for i, visits in enumerate((100, 0, 0)):
        controller.round({SERVERS[0]: state(busy("a", visits))}, 5.0 * i)
    assert not controller._loads.decay(15.0)


def test_controller_without_any_server_orders_nothing() -> None:
    controller = Controller(SERVERS, 0.0)
    for i in range(2 * MISSES):
        assert controller.round(dict.fromkeys(SERVERS), 5.0 * i) == []
