"""Removal of one adapter's branch of the tree, KV before the adapter, a few nodes per call.

Nodes are checked round robin (``AdapterNode.next_kv``), so the cost of a call is bounded by its
budget, regardless of how many nodes the branch has, are on the host, or are in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang.srt.disaggregation.kv_events import StorageMedium
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import BaseEvictionResult

from sglang_elora.srt.mem_cache.adapter_node import AdapterNode
from sglang_elora.srt.mem_cache.freed import Freed, parts_of
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore

LOOKS_PER_LEAF = 16
"""Most nodes that an eviction checks per leaf that it may evict; nodes on the host are skipped.
More find leaves among more such nodes, in a longer call."""


@dataclass(slots=True)
class Purge:
    """Result of one call of ``purge``."""

    num_looks: int = 1  # nodes checked
    num_removed: int = 0  # nodes removed, including the adapter's
    is_over: bool = False  # the adapter and all its KV are removed
    freed: BaseEvictionResult = field(default_factory=BaseEvictionResult)


def evict(core: EloraTreeCore, adapter_id: str, most_leaves: int, freed: Freed) -> bool:
    """Evict leaves of one adapter from the device, the adapter last, unless a request holds it.

    KV without a host copy is dropped together with the KV below it on the host, which would be
    unreachable.

    Returns:
        Whether nothing is left that can be evicted.
    """
    top = core.node_of(adapter_id)
    num_leaves = num_looks = 0
    while top.adapter.resident and not core.is_locked(adapter_id):
        if num_leaves >= most_leaves or num_looks >= LOOKS_PER_LEAF * most_leaves:
            return False
        num_looks += 1
        node: UnifiedTreeNode = top if top.adapter.device_tokens == 0 else top.next_kv()
        if node is top and not core._is_device_leaf(top):  # an adapter without slots
            break
        while num_leaves < most_leaves and core._is_device_leaf(node):
            parent = node.parent
            if node.children and not node.backuped:
                looks_left = LOOKS_PER_LEAF * most_leaves - num_looks
                num_looks += _remove_below(core, node, looks_left, freed)
                if node.children:  # the budget is used up, or a node is held
                    break
            core._take_off_device(node, freed)
            num_leaves += 1
            if parent.id not in top.kv_nodes:  # the adapter, or removed with its child
                break
            node = parent
    return True


def purge(core: EloraTreeCore, adapter_id: str, most_looks: int) -> Purge:
    """Remove KV of a retired adapter from device and host, then its slots and its node.

    Nodes that a request or a copy holds, and the nodes above them, are kept. Call again until
    ``is_over``.

    Args:
        most_looks: Most nodes to check; at least one is checked.
    """
    top, done = core.node_of(adapter_id), Purge()
    assert top.adapter.retired, f"adapter {adapter_id} is in use"
    if top.adapter.pinned and top.adapter.resident:
        core.adapter_table.unpin(top.adapter)
        core.dec_full_pin(top.id)
    num_in_vain = 0  # nodes checked since the last removal
    while top.kv_nodes and done.num_looks < most_looks and num_in_vain < len(top.kv_nodes):
        removed_before = done.num_removed
        _remove_upwards(core, top, most_looks, done)
        num_in_vain = 0 if done.num_removed > removed_before else num_in_vain + 1
    if not top.kv_nodes and not _is_held(top):
        core.remove_adapter_node(top, done.freed.device_frees)
        done.num_removed += 1
        done.is_over = True
    else:
        core._update_evictable_leaf_sets(top)
    return done


def _remove_upwards(core: EloraTreeCore, top: AdapterNode, most_looks: int, done: Purge) -> None:
    """Remove the next leaf of an adapter if it is not held, then each parent of the same adapter
    that becomes such a leaf."""
    node = top.next_kv()
    done.num_looks += 1
    while not node.children and not _is_held(node):
        if done.num_looks > most_looks:
            break
        parent = node.parent
        _remove(core, node, parts_of(done.freed))
        done.num_removed += 1
        node = parent
        if node.id not in top.kv_nodes:
            break
        done.num_looks += not node.children
    core._update_evictable_leaf_sets(node)


def _remove_below(core: EloraTreeCore, top: UnifiedTreeNode, most_nodes: int, freed: Freed) -> int:
    """Remove nodes below ``top``, leaves first, until one is held. Returns the number removed."""
    leaf, num_removed = top, 0
    while num_removed < most_nodes:
        while leaf.children:
            leaf = next(iter(leaf.children.values()))
        if leaf is top or _is_held(leaf):
            break
        parent = leaf.parent
        _remove(core, leaf, freed)
        num_removed += 1
        leaf = parent
    core._update_evictable_leaf_sets(leaf)
    return num_removed


def _remove(core: EloraTreeCore, leaf: UnifiedTreeNode, freed: Freed) -> None:
    medium = StorageMedium.CPU if leaf.evicted else StorageMedium.GPU
    core._release_all_component_layers(leaf, medium, *freed)
    core._remove_leaf_from_parent(leaf)


def _is_held(node: UnifiedTreeNode) -> bool:
    return (
        any(data.lock_ref > 0 or data.host_lock_ref > 0 for data in node.component_data)
        or node.write_through_pending_id is not None
        or node.load_back_pending_id is not None
    )
