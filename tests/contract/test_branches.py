"""An adapter with much KV is unloaded, or evicted, in bounded parts, one per step.

The server's own pool and tree, without a model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_elora.tree import namespace_of
from tests.harness.swapper_world import EVICT_LEAVES, PURGE_NODES, SwapperWorld, adapter_id

SLOTS = 64  # of an adapter


class CountedChildren(dict[Any, Any]):
    """Counts the children that a walk looks at."""

    num_seen = 0

    def values(self) -> Any:
        for child in super().values():
            self.num_seen += 1
            yield child


def world(num_leaves: int, num_slots: int = 8 * SLOTS) -> SwapperWorld:
    """Return a world with adapter 0 on the device and its KV leaves under one common prefix."""
    made = SwapperWorld(num_slots + num_leaves + 2, num_adapters=3, adapter_slots=SLOTS)
    bring(made, adapter_id(0))
    for i in range(num_leaves):
        made.cache_kv(adapter_id(0), [7, 8, 1000 + i])
    return made


def bring(made: SwapperWorld, name: str) -> None:
    made.arrive(name)
    made.step()
    made.waiting.clear()
    made.step()
    assert made.is_resident(name)


def num_nodes(made: SwapperWorld) -> int:
    return len(made.core._node_arena)


def purge(made: SwapperWorld) -> int:
    """Call ``prepare`` until nothing is left to purge; return the number of calls."""
    for calls in range(1_000):
        if not made.swapper.is_waiting:
            return calls
        made.swapper.prepare()
    raise AssertionError("the purge does not end")


@pytest.mark.parametrize("is_busy", [True, False])
def test_unload_purges_a_bounded_number_of_nodes_per_step(
    is_busy: bool,
) -> None:
    made = world(20 * PURGE_NODES)
    nodes = num_nodes(made)
    made.residency.retire(adapter_id(0))
    steps = 0
    while adapter_id(0) in made.residency.adapter_table:
        assert nodes - PURGE_NODES <= num_nodes(made) < nodes
        assert made.swapper.is_waiting
        made.check()
        nodes = num_nodes(made)
        made.step(is_busy=is_busy)
        if is_busy:
            made.swapper.prepare()
        steps += 1
    assert 20 <= steps <= 24  # some calls find no removable node
    assert not made.swapper.is_waiting
    assert made.cache.allocator.available_size() == made.residency.pool_slots
    counts = made.residency.statistics()
    assert counts["kv_slots_evicted.unload"] == 20 * PURGE_NODES + 2
    assert counts["adapter_evictions.unload"] == 1
    assert counts["adapters_resident"] == counts["adapter_loads"] - counts["adapter_evictions"]
    made.check()


def test_reloaded_adapter_keeps_its_kv_while_the_old_id_is_purged() -> None:
    made = world(5 * PURGE_NODES)
    made.residency.retire(adapter_id(0))
    made.load("again")
    made.residency.names["again"] = adapter_id(0)
    bring(made, "again")
    made.cache_kv("again", [7, 8, 1000])
    assert adapter_id(0) in made.residency.adapter_table
    purge(made)
    assert adapter_id(0) not in made.residency.adapter_table
    assert made.cache.match([7, 8, 1000], namespace_of("again")).device_prefix_len == 3
    assert made.residency.adapter_table.device_tokens == 3
    made.check()


def test_flush_during_a_purge_ends_the_purge() -> None:
    made = world(5 * PURGE_NODES)
    made.residency.retire(adapter_id(0))
    made.cache.tree.reset()
    made.cache.allocator.clear()
    assert adapter_id(0) not in made.residency.adapter_table
    made.swapper.prepare()
    assert not made.swapper.is_waiting
    made.check()
    bring(made, adapter_id(1))
    made.check()


def test_purge_skips_locked_kv_and_removes_it_after_unlock() -> None:
    made = world(5 * PURGE_NODES)
    nodes = [
        made.cache.match([7, 8, 1000 + i], namespace_of(adapter_id(0))).last_device_node
        for i in range(2 * PURGE_NODES)  # more than one call visits
    ]
    receipts = [made.cache.lock(node) for node in nodes]
    made.residency.retire(adapter_id(0))
    for _ in range(20):
        made.swapper.prepare()
    assert made.residency.adapter_table.get(adapter_id(0)).device_tokens == 2 * PURGE_NODES + 2
    assert not made.swapper.is_waiting  # or an idle server would not sleep
    made.check()
    for node, receipt in zip(nodes, receipts, strict=True):
        made.cache.unlock(node, receipt)
    made.swapper.prepare()
    assert made.swapper.is_waiting
    purge(made)
    assert adapter_id(0) not in made.residency.adapter_table
    made.check()


def test_purge_of_several_adapters_is_not_blocked_by_a_locked_one() -> None:
    made = world(2 * PURGE_NODES)
    made.residency.retire(adapter_id(0))
    held = made.cache.lock(made.core.node_of(adapter_id(1)).id)
    made.residency.retire(adapter_id(1))
    made.residency.retire(adapter_id(2))
    purge(made)
    assert [adapter.adapter_id for adapter in made.residency.adapter_table] == [adapter_id(1)]
    made.cache.unlock(made.core.node_of(adapter_id(1)).id, held)
    made.swapper.prepare()
    assert len(made.residency.adapter_table) == 0
    made.check()


def test_evicted_kv_of_an_unloaded_adapter_is_not_offloaded() -> None:
    made = world(4 * PURGE_NODES)
    made.core.is_write_back = True
    (begin,) = made.core.node_of(adapter_id(0)).children.values()
    leaf = next(iter(begin.children.values()))
    made.residency.retire(adapter_id(0))
    assert not made.core._is_worth_host_copy(leaf)
    assert made.core._is_worth_host_copy(begin), "what is below it would be lost"
    made.core.is_write_back = False


def test_popularity_drops_unloaded_adapters() -> None:
    made = SwapperWorld(8 * SLOTS, num_adapters=1, adapter_slots=SLOTS)
    made.swapper.used(adapter_id(0))
    for i in range(1, 50):
        made.load(adapter_id(i))
        made.swapper.used(adapter_id(i))
        made.residency.retire(adapter_id(i))
    assert len(made.measured.popularity) == 1


def test_adapter_eviction_visits_its_host_kv_once() -> None:
    """Leaves whose KV is on the host stay children of the adapter's node."""
    num_leaves = 20 * EVICT_LEAVES
    made = world(num_leaves)
    adapter = made.residency.adapter_table.get(adapter_id(0))
    top = made.core.node_of(adapter_id(0))
    begin = next(iter(top.children.values()))
    begin.children = children = CountedChildren(begin.children)
    for node in top.kv_nodes.values():
        data = node.component_data[0]
        data.host_value = torch.arange(len(data.value))
        made.residency.adapter_table.count_kv(adapter, device=0, host=len(data.value))
        made.core.recount(node)
        made.core._update_evictable_leaf_sets(node)
    children.num_seen = 0
    made.swapper.evict_soon(adapter_id(0))
    calls = 0
    while adapter.resident:
        made.swapper.prepare()
        calls += 1
        assert calls <= num_leaves, "nothing is evicted"
    made.swapper.prepare()
    assert adapter.device_tokens == 0 and adapter.host_tokens == num_leaves + 2
    assert calls <= 2 + num_leaves // EVICT_LEAVES
    assert children.num_seen <= 8 * num_leaves
