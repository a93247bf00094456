"""A check of the whole tree of adapters and KV, for ``--elora-check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId, UnifiedTreeNode

from sglang_elora.policy import CacheEntry
from sglang_elora.srt.mem_cache.adapter_node import FULL, AdapterNode
from sglang_elora.tree import EvictionOrder, adapter_of, is_activated

if TYPE_CHECKING:
    from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore


def check_tree(core: EloraTreeCore) -> None:
    """Check the order of leaves and the counts of each adapter against the tree.

    SGLang's ``sanity_check`` checks structure, leaves, sizes and locks, including those of adapter
    nodes.

    Raises:
        AssertionError: KV is on the device without its adapter, a node is below a wrong one, KV is
            locked without its adapter, or a count is wrong.
        RuntimeError: The eviction order does not match the leaves.
    """
    for leaves in (core.evictable_device_leaves, core.evictable_host_leaves):
        if isinstance(leaves, EvictionOrder):
            leaves.check_invariants()
    core.adapter_table.check_invariants()
    if core.policy is not None:
        core.policy.check_invariants(_entries_on_device(core))
    counted = {
        adapter_id: [0, 0]
        for adapter_id in (None, *(adapter.adapter_id for adapter in core.adapter_table))
    }
    below: dict[str | None, set[NodeId]] = {adapter_id: set() for adapter_id in counted}
    for node in core._collect_all_nodes():
        if node is core.root_node or isinstance(node, AdapterNode):
            continue
        data = node.component_data[FULL]
        adapter_id = adapter_of(node.key.extra_key)
        _check_place(core, node, adapter_id)
        below[adapter_id].add(node.id)
        counted[adapter_id][0] += 0 if data.value is None else len(data.value)
        counted[adapter_id][1] += 0 if data.host_value is None else len(data.host_value)
    for adapter in (core.adapter_table.base, *core.adapter_table):
        assert counted[adapter.adapter_id] == [adapter.device_tokens, adapter.host_tokens], (
            f"{adapter} holds {counted[adapter.adapter_id]} tokens"
        )
        assert adapter.retired or adapter.invalid_tokens == 0, (
            f"KV on the device without its adapter: {adapter}"
        )
        node = core.known_node_of(adapter.adapter_id)
        if node is None:
            assert adapter.adapter_id is None or not below[adapter.adapter_id], adapter
            continue
        assert below[adapter.adapter_id] == node.kv_nodes.keys(), (
            f"nodes of {adapter.adapter_id} are not those listed"
        )
        if adapter.resident:
            assert len(node.slots) == adapter.num_slots, f"{adapter} in {len(node.slots)} slots"
            assert not adapter.pinned or node.is_locked, adapter


def _check_place(core: EloraTreeCore, node: UnifiedTreeNode, adapter_id: str | None) -> None:
    namespace = node.key.extra_key
    if adapter_id is None:
        return
    if not is_activated(namespace):
        assert _is_under(node, core.node_of(adapter_id)), f"{node.key} is misplaced"
        return
    above = node.parent.key.extra_key
    assert above == namespace or adapter_of(above) is None, f"{node.key} is misplaced"
    assert node.component_data[FULL].lock_ref == 0 or core.is_locked(adapter_id), (
        f"{node.key} is locked without its adapter"
    )


def _entries_on_device(core: EloraTreeCore) -> list[CacheEntry]:
    nodes = [node for node in core._collect_all_nodes() if node is not core.root_node]
    return [
        n.entry
        for n in nodes
        if n.component_data[FULL].value is not None
        and (not isinstance(n, AdapterNode) or n.adapter.resident)
    ]


def _is_under(node: UnifiedTreeNode, ancestor: UnifiedTreeNode) -> bool:
    while node is not None and node is not ancestor:
        node = node.parent
    return node is ancestor
