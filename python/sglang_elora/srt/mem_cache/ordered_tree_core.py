"""A subclass of SGLang's Python tree core that keeps leaves in eviction order.

With a policy, each node has an ``entry``, which the policy ranks. Without one (no LoRA), leaves are
evicted in the order of --radix-eviction-policy, found by a heap instead of a scan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core import (
    NodeId,
    UnifiedTreeCore,
    UnifiedTreeNode,
)
from typing_extensions import override

from sglang_elora.control import Counters
from sglang_elora.policy import CacheEntry, Policy, SessionState
from sglang_elora.tree import (
    MAX_REMEMBERED,
    Eviction,
    EvictionOrder,
    Ghosts,
    PrefixHash,
    Reason,
    TierOrders,
    adapter_of,
    end_turn,
    fork,
    is_activated,
)
from sglang_elora.tree.sessions import NOBODY, Sessions


class OrderedTreeCore(UnifiedTreeCore):
    """A tree core that reports changes of nodes to a policy and keeps leaves in its order."""

    def __init__(self, params: Any, components: Any) -> None:
        self.policy: Policy | None = None
        self.eviction: Eviction | None = None  # the current one; None in SGLang's own evictions
        self.orders: TierOrders[UnifiedTreeNode] | None = None  # with a policy
        self.ghosts: Ghosts | None = None  # with a policy that keeps them
        self._prefix_hash = PrefixHash()
        self._pool_slots = 1
        self._next_entry = _no_entry()  # entry of the node that is created next
        self.splits_at_prompt_end = False  # True while a request's answer is split off its prompt
        self.counts = Counters()
        self.evicted: deque[NodeId] = deque(maxlen=MAX_REMEMBERED)  # most valuable last
        self.sessions = Sessions[UnifiedTreeNode](self.path_of, self._set_session_state)
        self._node_arena: dict[int, UnifiedTreeNode] = {}
        super().__init__(params, components)

    @override
    def reset(self) -> None:
        for node in self._node_arena.values():
            self._forget(node)
        self.sessions.clear()
        if self.ghosts is not None:
            self.ghosts.clear()
        super().reset()
        self._make_orders()
        self.evicted.clear()

    def use_policy(self, policy: Policy, pool_slots: int) -> None:
        """Order nodes by this policy. Call while the tree is empty."""
        self.policy, self._pool_slots = policy, pool_slots
        self.ghosts = Ghosts(policy) if policy.ghost_turnovers else None
        self._make_orders()

    @property
    def clock(self) -> float:
        """The policy's clock, in turnovers of the pool."""
        assert self.policy is not None
        return self.policy.clock

    def _make_orders(self) -> None:
        full, policy = cast(Any, self.components_by_type[ComponentType.FULL]), self.policy
        if policy is not None:
            self.orders = TierOrders(policy, attrgetter("backuped"))
            self.evictable_device_leaves = self.orders.device
            self.evictable_host_leaves = self.orders.host
        elif full.keeps_order:
            self.evictable_device_leaves = EvictionOrder(self.eviction_strategy.get_priority)
            self.evictable_host_leaves = EvictionOrder(self.eviction_strategy.get_priority)

    def visit(self, node_id: NodeId) -> None:
        """Record that a request uses the path that ends at this node. Call once per request."""
        path = [node.entry for node in self._used_at(node_id)]
        if self.policy is not None:
            for item in path:
                if item.prefetched:
                    item.prefetched = False
                    self.counts.prefetched_slots_used += item.num_slots
            self.policy.visit(path)

    def _used_at(self, node_id: NodeId) -> list[UnifiedTreeNode]:
        """The nodes that a request uses which has found the KV up to this node."""
        return self.path_of(self.node_by_id(node_id))

    @override
    def _new_node(self, priority: int = 0) -> UnifiedTreeNode:
        node = super()._new_node(priority=priority)
        node.entry, self._next_entry = self._next_entry, _no_entry()
        node.sessions, node.num_sessions = NOBODY, 0
        node.prefix_len = node.prefix_hash = 0
        return node

    @override
    def _split_node(
        self, key: RadixKey, child: UnifiedTreeNode, split_len: int
    ) -> tuple[UnifiedTreeNode, Any]:
        first, action = super()._split_node(key, child, split_len)
        if self.policy is not None:
            first.entry = self.policy.split(child.entry, split_len)
            if not self.splits_at_prompt_end:
                fork(first.entry, (node.entry for node in self._above(first)))
            if self.ghosts is not None:
                self._hash_prefix(first)
        if child.num_sessions:
            self.sessions.split(child, first)
        return first, action

    @override
    def _unregister_node(self, node: UnifiedTreeNode) -> None:
        super()._unregister_node(node)
        self._forget(node)

    def _forget(self, node: UnifiedTreeNode) -> None:
        if node.num_sessions:
            self.sessions.drop(node)
        if self.policy is not None:
            self.policy.displace(node.entry)
            if node.entry.is_adapter:
                return
            if self.ghosts is not None and node.prefix_len:
                self.ghosts.add(_namespace(node.key), node.prefix_hash, node.entry)
            else:
                self.policy.remove(node.entry)

    def end_turn(self, end: UnifiedTreeNode) -> None:
        """Record that a request has finished, with its KV ending at node ``end``."""
        if self.policy is not None:
            end_turn([node.entry for node in self.path_of(end)])

    def path_of(self, node: UnifiedTreeNode) -> list[UnifiedTreeNode]:
        """The nodes from this one up to its adapter, or to a child of the root for KV of the base
        model."""
        return [node, *self._above(node)] if node.parent is not None else []

    @staticmethod
    def _above(node: UnifiedTreeNode) -> Iterator[UnifiedTreeNode]:
        """The nodes above this one, from its parent up to the adapter; the root is left out."""
        above = node.parent
        while above is not None and above.parent is not None:
            yield above
            above = above.parent

    def _set_session_state(self, node: UnifiedTreeNode, state: SessionState) -> None:
        if self.orders is not None:
            self.orders.set_session_state(node, state)

    def refresh_order(self) -> None:
        """Refresh the order on the device (``TierOrders.refresh``)."""
        if self.orders is not None:
            self.orders.refresh()

    def learn(self) -> bool:
        """Have the policy learn; call when there is time. Returns whether there was work."""
        return self.policy is not None and self.policy.learn()

    @contextmanager
    def evicting(self, eviction: Eviction) -> Iterator[None]:
        """Apply the limits and the reason of ``eviction`` to all evictions in this block: SGLang's
        code passes on only a number of tokens. Outside of such a block nothing is protected, and
        evictions count as ``capacity``."""
        self.eviction = eviction
        try:
            yield
        finally:
            self.eviction = None

    @property
    def reason(self) -> Reason:
        """Reason of the current eviction."""
        return "capacity" if self.eviction is None else self.eviction.reason

    def note_eviction(self, node: UnifiedTreeNode) -> None:
        """Record that the node left the device. It may be loaded back, unless it was evicted by a
        call of the HTTP API."""
        if self.reason != "api":
            self.evicted.append(node.id)
        if node.entry.prefetched:
            node.entry.prefetched = False
            self.counts.prefetched_slots_wasted += node.entry.num_slots

    def recount(self, node: UnifiedTreeNode, *, leaving: bool = False) -> None:
        """Update the policy after a node was added to a tier or removed from one.

        Args:
            leaving: The node is leaving the device, but its value is still set.
        """
        policy, item = self.policy, node.entry
        if policy is not None:
            policy.displace(item)
            item.backed = node.backuped
            value = node.component_data[ComponentType.FULL].value
            if value is not None and len(value) and not leaving:
                policy.place(item)

    def _fill(self, num_slots: int) -> None:
        if self.policy is not None:
            self.policy.advance(num_slots / self._pool_slots)

    @override
    def _add_new_node(
        self, parent: UnifiedTreeNode, key: RadixKey, value: torch.Tensor, **options: Any
    ) -> UnifiedTreeNode:
        item = CacheEntry(False, len(value), adapter_of(key.extra_key), is_activated(key.extra_key))
        if self.policy is not None:
            self.policy.create(item)
        self._next_entry = item
        node = super()._add_new_node(parent, key, value, **options)
        if self.ghosts is not None:
            hashes = self._hash_prefix(node)
            if self.ghosts.has(namespace := _namespace(key)):
                self.ghosts.recall(namespace, hashes.tolist(), item)
        return node

    def _hash_prefix(self, node: UnifiedTreeNode) -> NDArray[np.uint64]:
        """Set the length and hash of all tokens up to the node's end; returns the hashes up to each
        of its tokens."""
        parent, tokens = node.parent, np.array(node.key.raw_token_ids(), dtype=np.int64)
        hashes = self._prefix_hash.after(parent.prefix_hash, parent.prefix_len, tokens)
        node.prefix_len = parent.prefix_len + len(tokens)
        node.prefix_hash = int(hashes[-1])
        return hashes


def _no_entry() -> CacheEntry:
    return CacheEntry(is_adapter=False, num_slots=0)


def _namespace(key: RadixKey) -> Hashable:
    return key.extra_key, key.cache_salt
