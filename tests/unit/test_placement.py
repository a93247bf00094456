"""Placement of adapters on the servers of a fleet."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from sglang_elora.fleet import Placement, preference
from sglang_elora.fleet.placement import BOUND, SHARE

SERVERS = tuple(f"server-{i}" for i in range(8))
ADAPTERS = [f"a{i:04}" for i in range(400)]
EVEN = dict.fromkeys(ADAPTERS, 1.0)


def skewed(seed: int = 0) -> dict[str, float]:
    rng = random.Random(seed)
    names = rng.sample(ADAPTERS, len(ADAPTERS))
    return {name: 100 / (1 + rank) for rank, name in enumerate(names)}


def assigned(placement: Placement, loads: dict[str, float]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, load in loads.items():
        servers = placement.servers_of(name)
        for server in servers:
            found[server] += load / len(servers)
    return found


def test_order_of_servers_is_a_permutation_that_differs_between_adapters() -> None:
    orders = [preference(name, SERVERS) for name in ADAPTERS]
    assert all(sorted(order) == [*SERVERS] for order in orders)
    first = Counter(order[0] for order in orders)
    assert len(first) == 8 and max(first.values()) < 2 * min(first.values())
    assert preference("a", SERVERS[::-1]) == preference("a", SERVERS)


def test_adapter_without_load_has_the_first_server_of_its_order() -> None:
    placement = Placement(SERVERS)
    assert placement.servers_of("a") == preference("a", SERVERS)[:1]


def test_equal_adapters_have_one_server_each() -> None:
    placement = Placement(SERVERS)
    assert sorted(copy.adapter for copy in placement.update(EVEN)) == ADAPTERS
    assert all(len(placement.servers_of(name)) == 1 for name in ADAPTERS)


@pytest.mark.parametrize("loads", [EVEN, skewed()], ids=["even", "skewed"])
def test_no_server_has_much_more_than_the_mean_load(loads: dict[str, float]) -> None:
    placement = Placement(SERVERS)
    placement.update(loads)
    found = assigned(placement, loads)
    assert max(found.values()) <= BOUND * sum(loads.values()) / len(SERVERS) + 1e-9


def test_popular_adapter_has_more_servers_and_none_has_more_than_its_share() -> None:
    loads = skewed()
    placement = Placement(SERVERS)
    placement.update(loads)
    counts = {name: len(placement.servers_of(name)) for name in loads}
    popular = max(loads, key=loads.__getitem__)
    assert counts[popular] == max(counts.values()) > 1
    fair = sum(loads.values()) / len(SERVERS)
    spread = [name for name in loads if counts[name] < len(SERVERS)]
    assert len(spread) > len(loads) - 10
    assert all(loads[name] / counts[name] <= SHARE * fair for name in spread)
    assert sum(counts.values()) < len(ADAPTERS) + 2 * len(SERVERS) / SHARE


def test_adapter_that_needs_all_servers_has_them_once() -> None:
    placement = Placement(SERVERS)
    placement.update({"a": 1.0})
    assert sorted(placement.servers_of("a")) == [*SERVERS]


@pytest.mark.parametrize("what", ["lost", "added"])
def test_change_of_the_fleet_moves_about_one_adapter_in_n(what: str) -> None:
    loads = {name: 1.0 + (i % 3) for i, name in enumerate(ADAPTERS)}
    placement = Placement(SERVERS)
    placement.update(loads)
    before = {name: placement.servers_of(name) for name in ADAPTERS}
    placement.set_servers(SERVERS[1:] if what == "lost" else [*SERVERS, "server-8"])
    placement.update(loads)
    moved = sum(before[name] != placement.servers_of(name) for name in ADAPTERS)
    assert moved < 2 * len(ADAPTERS) / len(SERVERS)
    assert all(set(placement.servers_of(name)) <= set(placement.servers) for name in ADAPTERS)
    if what == "lost":
        assert moved > 0


def test_small_changes_of_load_move_nothing() -> None:
    rng = random.Random(0)
    loads = skewed()
    placement = Placement(SERVERS)
    placement.update(loads)
    new = []
    for _ in range(20):
        new += placement.update({n: load * rng.uniform(0.95, 1.05) for n, load in loads.items()})
    assert len(new) < len(ADAPTERS) / 10


def test_adapter_gives_up_servers_when_its_load_falls() -> None:
    loads = {**EVEN, "hot": 100.0}
    placement = Placement(SERVERS)
    placement.update(loads)
    assert len(placement.servers_of("hot")) > 2
    new = placement.update({**EVEN, "hot": 1.0})
    assert len(placement.servers_of("hot")) == 1
    assert "hot" not in {copy.adapter for copy in new}


def test_adapter_without_load_any_more_stays_at_home_only() -> None:
    home, other, *_ = preference("hot", SERVERS)
    placement = Placement(SERVERS)
    placement.restore({"hot": [other, home, "unknown"]})
    assert placement.servers_of("hot") == (other, home)
    for _ in range(2):
        assert "hot" not in {copy.adapter for copy in placement.update(EVEN)}
        assert placement.servers_of("hot") == (home,)


def test_every_new_copy_says_why() -> None:
    placement = Placement(SERVERS)
    (copy, *_) = placement.update({"a": 1.0, "b": 3.0})
    assert copy.why == "6.00 of a server's load on 8 servers"
