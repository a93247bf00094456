"""The tree core: SGLang's Python one, with adapter nodes between the root and the KV.

Each adapter is a child of the root. Its value is the slots of its weights, empty while it is not on
the device. Its KV is below it, so SGLang's handling of nodes covers adapters, too: a lock on a
request's path protects the adapter, its slots count as evictable or protected, and it is an
evictable leaf only when none of its KV is on the device.

Walks start at the adapter's node, as SGLang's Rust core starts them at a root per namespace
(``root_node_handle``, ``is_root``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.cache_action import BackupKV
from sglang.srt.mem_cache.unified_cache.components.base import (
    ComponentType,
    get_and_increase_time_counter,
)
from sglang.srt.mem_cache.unified_cache.unified_tree_core import (
    NodeId,
    UnifiedTreeNode,
)
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import (
    BaseEvictionResult,
    EvictDeviceLeafResult,
    InsertStepResult,
)
from typing_extensions import override

from sglang_elora.policy import CacheEntry
from sglang_elora.srt.mem_cache import activated
from sglang_elora.srt.mem_cache.adapter_node import FULL, AdapterNode
from sglang_elora.srt.mem_cache.freed import Freed, parts_of
from sglang_elora.srt.mem_cache.ordered_tree_core import OrderedTreeCore
from sglang_elora.srt.mem_cache.tree_check import check_tree
from sglang_elora.tree import (
    ActivatedNamespace,
    AdapterTable,
    adapter_of,
    is_activated,
)

CHURN_S = 10.0
"""Seconds. An adapter loaded again within this time of its eviction counts as churn; raising it
counts more."""


class EloraTreeCore(OrderedTreeCore):
    """The tree of adapters and KV (see the module docstring). ``on_evicted`` is called with the id
    of each adapter that leaves the device."""

    root_node: UnifiedTreeNode

    def __init__(self, params: Any, components: Any) -> None:
        self.adapter_table = AdapterTable()
        self.on_evicted: Callable[[str], None] = lambda adapter_id: None
        self._walk_root: UnifiedTreeNode | None = None
        super().__init__(params, components)

    @override
    def reset(self) -> None:
        super().reset()
        for adapter_id in [
            str(adapter.adapter_id) for adapter in self.adapter_table if adapter.resident
        ]:
            self.on_evicted(adapter_id)
        self.adapter_table.clear_tree()
        self._adapter_nodes: dict[str, AdapterNode] = {}
        self._tree_root = self.root_node  # ``root_node`` is another node during a walk
        self._no_slots = torch.empty(0, dtype=torch.int64, device=self.device)

    # ==== Queries ====

    @property
    def full(self) -> Any:
        """The full-attention component."""
        return self.components_by_type[FULL]

    def image_priority(self, adapter_id: str) -> float:
        """Priority of an adapter's image in host memory (``TierOrders.image_priority``)."""
        assert self.orders is not None
        return self.orders.image_priority(self.adapter_table.get(adapter_id).entry)

    def find(self, node_id: NodeId) -> UnifiedTreeNode | None:
        """The node of this id; None if it is no longer in the tree."""
        return self._node_arena.get(node_id)

    def is_held(self, adapter_id: str) -> bool:
        """Whether the adapter cannot or should not be evicted: a running or queued request needs
        it, a copy writes it, or it is pinned."""
        return self.adapter_table.get(
            adapter_id
        ).entry.queue_position is not None or self.is_locked(adapter_id)

    def is_locked(self, adapter_id: str) -> bool:
        """Whether a request or a copy holds the adapter, or it is pinned."""
        return self.node_of(adapter_id).is_locked

    def path_of(self, node: UnifiedTreeNode) -> list[UnifiedTreeNode]:
        path = super().path_of(node)
        return [*path, self.adapter_node_of(node)] if is_activated(node.key.extra_key) else path

    def _used_at(self, node_id: NodeId) -> list[UnifiedTreeNode]:
        path = super()._used_at(node_id)
        if isinstance(node_id, activated.NodeWithAdapter):
            path.append(self.node_of(node_id.adapter_id))
        return path

    # ==== Where walks start ====

    def node_of(self, adapter_id: str) -> AdapterNode:
        """The adapter's node, created at first use."""
        node = self._adapter_nodes.get(adapter_id)
        if node is None:
            node = self._adapter_nodes[adapter_id] = AdapterNode(
                self.adapter_table.get(adapter_id), self._no_slots
            )
            node.parent = self._tree_root
            self._tree_root.children[self._child_key(adapter_id)] = node
            self._register_node(node)
        return node

    def adapter_node_of(self, node: UnifiedTreeNode) -> AdapterNode:
        """The node of the adapter that computed this KV."""
        return self.node_of(str(adapter_of(node.key.extra_key)))

    def known_node_of(self, adapter_id: str | None) -> AdapterNode | None:
        """The adapter's node, if it was created."""
        return None if adapter_id is None else self._adapter_nodes.get(adapter_id)

    @override
    def root_node_handle(self, extra_key: str | None = None) -> NodeId:
        if isinstance(extra_key, ActivatedNamespace):
            return activated.with_adapter(self, self._root_of(extra_key.base).id, extra_key)
        return self._root_of(extra_key).id

    @override
    def is_root(self, node_id: NodeId) -> bool:
        return isinstance(self.node_by_id(node_id), AdapterNode) or super().is_root(node_id)

    @override
    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        if type(params.key.extra_key) is ActivatedNamespace:  # asked of every request
            return activated.match(self, params)
        root = self._root_of(params.key.extra_key)
        if not (self.enable_hicache or self.is_eagle or len(self.components) > 1):
            return self._match_on_device(root, params.key.page_aligned(self.page_size))
        result: MatchResult = self._walk_from(root, super().match_prefix, params)
        if result is self._empty_match_result:
            return result._replace(
                last_device_node=root.id, last_host_node=root.id, best_match_node=root.id
            )
        return result

    def _match_on_device(self, root: UnifiedTreeNode, key: RadixKey) -> MatchResult:
        """A faster equivalent of SGLang's match, for one component and no host tier."""
        node, length, page_size = root, len(key), self.page_size
        matched, actions = 0, []
        while matched < length:
            child = node.children.get(key.child_key_at(matched, page_size))
            if child is None:
                break
            shared = child.key.match_at(key, matched, page_size)
            is_whole = shared == len(child.key)
            if not is_whole:
                child, action = self._split_node(child.key, child, shared)
                actions += [] if action is None else [action]
            node, matched = child, matched + shared
            if not is_whole:
                break
        visited, time = node, get_and_increase_time_counter()
        while visited is not None:  # as in SGLang, the end of a path has the latest time
            visited.last_access_time = time
            visited, time = visited.parent, time - 0.00001
        found = node.id
        return MatchResult(
            matched,
            found,
            found,
            found,
            full_kv_hit_length=matched,
            cache_actions=actions,
            last_visited_node_id=None if node is root else found,
        )

    @override
    def collect_full_device_indices(
        self, from_node_id: NodeId, until_node_id: NodeId
    ) -> torch.Tensor:
        """The slots of the KV on a path, without those of the adapter at its top.

        SGLang collects a request's slots up to the root of the tree, above the adapter.
        """
        until = self.node_by_id(until_node_id)
        namespace = self.node_by_id(from_node_id).key.extra_key
        if until is self._tree_root and not is_activated(namespace):
            until = self._root_of(namespace)
        slots: torch.Tensor = super().collect_full_device_indices(from_node_id, until.id)
        return slots

    @override
    def begin_insert(self, params: InsertParams) -> InsertStepResult:
        root = self._root_of(params.key.extra_key)
        if params.inserted_len == 0 and self._walk_root is None:
            root.hit_count += 1  # once per request, as for each node on the path
        return self._walk_from(root, super().begin_insert, params)

    @override
    def match_full_device_prefix(self, key: RadixKey) -> tuple[int, NodeId, int]:
        walk = super().match_full_device_prefix
        found: tuple[int, NodeId, int] = self._walk_from(self._root_of(key.extra_key), walk, key)
        return found

    @contextmanager
    def walks_from(self, node_id: NodeId) -> Iterator[None]:
        """Start walks within this block at this node, whatever their namespace."""
        self._walk_root = self.node_by_id(node_id)
        try:
            yield
        finally:
            self._walk_root = None

    def _root_of(self, namespace: str | None) -> UnifiedTreeNode:
        if self._walk_root is not None:
            return self._walk_root
        adapter_id = adapter_of(namespace)
        return self.root_node if adapter_id is None else self.node_of(adapter_id)

    def _walk_from(self, root: UnifiedTreeNode, walk: Callable[[Any], Any], argument: Any) -> Any:
        self.root_node = root
        try:
            return walk(argument)
        finally:
            self.root_node = self._tree_root

    @staticmethod
    def _child_key(adapter_id: str) -> tuple[str, str]:
        return (
            "adapter",
            adapter_id,
        )  # differs from all keys of KV children, which consist of tokens and namespace

    # ==== Counting KV per adapter ====

    def count_kv(self, node: UnifiedTreeNode, *, device: int = 0, host: int = 0) -> None:
        """Record that KV tokens of ``node`` were added to (or, if negative, removed from) the
        device and the host."""
        adapter_id = adapter_of(node.key.extra_key)
        adapter = self.adapter_table.get(adapter_id)
        had_kv = adapter.device_tokens > 0
        if device > 0:
            self._fill(device)
        elif device < 0:
            self.counts.kv_slots_evicted[self.reason] -= device
            if node.backuped:
                self.note_eviction(node)
        self.adapter_table.count_kv(adapter, device=device, host=host)
        self.recount(node, leaving=device < 0)  # SGLang clears the node's value after this
        if adapter_id is not None and had_kv != (adapter.device_tokens > 0):
            self._update_evictable_leaf_sets(self.node_of(adapter_id))

    @override
    def _add_new_node(
        self, parent: UnifiedTreeNode, key: RadixKey, value: torch.Tensor, **options: Any
    ) -> UnifiedTreeNode:
        node = super()._add_new_node(parent, key, value, **options)
        self._list_kv(node)
        self.count_kv(node, device=len(value))
        return node

    @override
    def _split_node(
        self, key: RadixKey, child: UnifiedTreeNode, split_len: int
    ) -> tuple[UnifiedTreeNode, Any]:
        first, action = super()._split_node(key, child, split_len)
        self._list_kv(first)
        return first, action

    def _list_kv(self, node: UnifiedTreeNode) -> None:
        """Add a new KV node to the list of its adapter."""
        adapter_id = adapter_of(node.key.extra_key)
        if adapter_id is not None:
            self.node_of(adapter_id).kv_nodes[node.id] = node

    @override
    def _unregister_node(self, node: UnifiedTreeNode) -> None:
        super()._unregister_node(node)
        adapter_id = adapter_of(node.key.extra_key)
        if adapter_id in self._adapter_nodes:
            self._adapter_nodes[adapter_id].kv_nodes.pop(node.id, None)

    def note_eviction(self, node: UnifiedTreeNode) -> None:
        """As in the base class, but nodes of a retired adapter are not loaded back."""
        super().note_eviction(node)
        if self.evicted and self.evicted[-1] == node.id and self._is_retired(node.entry):
            self.evicted.pop()

    @override
    def _unevict_node_on_insert(
        self, node: UnifiedTreeNode, fresh_value: torch.Tensor, session_id: str | None = None
    ) -> None:
        super()._unevict_node_on_insert(node, fresh_value, session_id)
        self.count_kv(node, device=len(fresh_value))

    # ==== Adapters as leaves ====

    @override
    def _is_device_leaf(self, node: UnifiedTreeNode) -> bool:
        data = node.component_data[FULL]
        if data.value is None or data.lock_ref > 0 or node is self.root_node:
            return False
        if isinstance(node, AdapterNode):  # without a scan of its children, which may be many
            return node.adapter.device_tokens == 0 and len(data.value) > 0
        for child in node.children.values():  # noqa: SIM110 - asked of each leaf: half the time of all()
            if child.component_data[FULL].value is not None:
                return False
        return True

    @override
    def _is_host_leaf(self, node: UnifiedTreeNode) -> bool:
        if node.component_data[FULL].value is not None:  # fast path for the most common case
            return False
        return bool(super()._is_host_leaf(node))

    @override
    def _is_settled_full_host_duplicate(self, node: UnifiedTreeNode) -> bool:
        return not isinstance(node, AdapterNode) and super()._is_settled_full_host_duplicate(node)

    @override
    def evict_device_leaf(self, node_id: NodeId, is_write_back: bool) -> EvictDeviceLeafResult:
        node = self.node_by_id(node_id)
        if not isinstance(node, AdapterNode):
            return super().evict_device_leaf(node_id, is_write_back)
        result = EvictDeviceLeafResult()
        self.evict_at_once(node, parts_of(result))
        return result

    def evict_at_once(self, leaf: UnifiedTreeNode, freed: Freed) -> bool:
        """Evict a device leaf. Returns False if its KV has to be copied to the host first."""
        assert self._is_device_leaf(leaf), f"node {leaf.id} is not a leaf"
        if self.policy is not None:
            self.policy.evict(leaf.entry)
        is_alone = not isinstance(leaf, AdapterNode) and not leaf.backuped
        if is_alone and self.is_write_back and self._is_worth_host_copy(leaf):
            return False
        self._take_off_device(leaf, freed)
        return True

    def _take_off_device(self, leaf: UnifiedTreeNode, freed: Freed) -> None:
        if isinstance(leaf, AdapterNode):
            tracker, device_frees, *_ = freed
            tracker[FULL] += len(leaf.slots)
            self._release_slots(leaf, device_frees)
            self.counts.adapter_evictions[self.reason] += 1
            leaf.adapter.evicted_s = time.monotonic()
            self.note_eviction(leaf)
        elif leaf.backuped:
            self._demote(leaf, *freed)
        else:
            self._delete_unbacked_device_leaf(leaf, *freed)

    def _is_retired(self, item: CacheEntry) -> bool:
        return item.group is not None and self.adapter_table.get(item.group).retired

    def _is_worth_host_copy(self, leaf: UnifiedTreeNode) -> bool:
        if self._is_retired(leaf.entry) and not leaf.children:
            return False
        return self.orders is None or self.orders.is_worth_host_copy(
            leaf,
            has_children=bool(leaf.children),
            has_room=lambda: self.full.host_room >= leaf.entry.num_slots,
        )

    def copies_ahead(self, most_leaves: int) -> list[BackupKV]:
        """Copies to the host that evictions of the next ``most_leaves`` victims would wait for."""
        assert self.orders is not None
        leaves = self.orders.next_victims(
            most_leaves, lambda leaf: not leaf.backuped and self._is_worth_host_copy(leaf)
        )
        return [self._build_backup_kv_action(leaf, write_back=True) for leaf in leaves]

    def place(self, adapter_id: str, slots: torch.Tensor) -> None:
        """Set the slots of an adapter that is loaded; a pinned one is locked.

        Args:
            slots: int64 ``[num_slots]``, owned by the tree from now on.
        """
        node = self.node_of(adapter_id)
        adapter = node.adapter
        num_slots = adapter.num_slots
        assert not adapter.resident and slots.shape == (num_slots,), adapter
        data = node.component_data[FULL]
        data.value = slots
        sizes = (
            self.component_protected_size_ if data.lock_ref > 0 else self.component_evictable_size_
        )
        sizes[FULL] += num_slots
        self.adapter_table.set_resident(adapter, True)
        self.recount(node)
        self.counts.adapter_loads += 1
        if time.monotonic() - adapter.evicted_s < CHURN_S:
            self.counts.adapter_churn += 1
        self._fill(num_slots)
        node.last_access_time = get_and_increase_time_counter()
        if adapter.pinned:
            self.inc_full_pin(node.id)
        self._update_evictable_leaf_sets(node)

    def displace(self, adapter_id: str) -> BaseEvictionResult:
        """Undo ``place`` for an adapter that no request uses. Returns the freed slots."""
        result, node = BaseEvictionResult(), self.node_of(adapter_id)
        if node.adapter.pinned and node.adapter.resident:
            self.dec_full_pin(node.id)
        assert self._is_device_leaf(node), f"adapter {adapter_id} is in use"
        self._release_slots(node, result.device_frees)
        return result

    def remove_adapter_node(
        self, node: AdapterNode, device_frees: dict[ComponentType, list[torch.Tensor]]
    ) -> None:
        """Remove a retired adapter without KV: its slots, its node and its table entry."""
        adapter_id = str(node.adapter.adapter_id)
        if node.adapter.resident:
            self.counts.adapter_evictions[self.reason] += 1
        self._release_slots(node, device_frees)
        del self._tree_root.children[self._child_key(adapter_id)]
        del self._adapter_nodes[adapter_id]
        self._unregister_node(node)
        self.adapter_table.remove(adapter_id)

    def _release_slots(
        self, node: AdapterNode, device_frees: dict[ComponentType, list[torch.Tensor]]
    ) -> None:
        if node.adapter.resident:
            self.component_evictable_size_[FULL] -= len(node.slots)
            if len(node.slots):
                device_frees[FULL].append(node.slots)
            node.component_data[FULL].value = node.no_slots
            self.adapter_table.set_resident(node.adapter, False)
            self.recount(node)
            self.on_evicted(str(node.adapter.adapter_id))
        self._update_evictable_leaf_sets(node)

    # ==== Check ====

    def check_invariants(self) -> None:
        """Check the tree as a whole (``tree_check.check_tree``)."""
        check_tree(self)
