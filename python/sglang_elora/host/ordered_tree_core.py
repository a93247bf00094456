"""The tree core: SGLang's Python one, whose leaves are kept in eviction order.

With a policy, each node has an ``item`` and goes when the policy says; without one (no LoRA) leaves
go in the order of --radix-eviction-policy, which is found by a heap and not by a scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core import (
    NodeId,
    UnifiedTreeCore,
    UnifiedTreeNode,
)

from sglang_elora.policy import Item, Policy
from sglang_elora.tree import LeafOrder

WANTED = -1
"""Kind of nodes that a waiting request needs: they go last, and only for a request that runs."""


class OrderedTreeCore(UnifiedTreeCore):
    """Tells a policy what happens to nodes, and keeps leaves in its order."""

    def __init__(self, params: Any, components: Any) -> None:
        self.policy: Policy | None = None
        self._pool_slots = 1
        self._spared_since = -1.0
        self._node_arena: dict[int, UnifiedTreeNode] = {}
        super().__init__(params, components)

    def reset(self) -> None:
        for node in self._node_arena.values():
            self._forget(node)
        super().reset()
        self._make_orders()

    def use_policy(self, policy: Policy, pool_slots: int) -> None:
        """Order nodes by this policy from now on; the tree is empty still."""
        self.policy, self._pool_slots = policy, pool_slots
        self._make_orders()

    def _make_orders(self) -> None:
        full, policy = cast(Any, self.components_by_type[ComponentType.FULL]), self.policy
        if policy is not None:
            self.evictable_device_leaves: LeafOrder[UnifiedTreeNode] = LeafOrder(
                lambda node: _priority(policy, node),
                lambda node: _kind(policy, node),
                lambda kind: math.inf if kind == WANTED else policy.bias(kind),
            )
            self.evictable_host_leaves: LeafOrder[UnifiedTreeNode] = LeafOrder(
                lambda node: policy.priority(node.item),
                lambda node: policy.kind(node.item),
                policy.host_bias,
            )
        elif full.keeps_order:
            self.evictable_device_leaves = LeafOrder(self.eviction_strategy.get_priority)
            self.evictable_host_leaves = LeafOrder(self.eviction_strategy.get_priority)

    def visit(self, node_id: NodeId) -> None:
        """A request uses the path that ends here; once per request."""
        node, path = self.node_by_id(node_id), []
        while node.parent is not None:
            path.append(node.item)
            node = node.parent
        if self.policy is not None:
            self.policy.visit(path)

    def want(self, node: UnifiedTreeNode, number: int | None) -> None:
        """A waiting request needs the path that ends here, or with None nobody does any more."""
        had, node.item.wanted_since = node.item.wanted_since, number
        if had is not None and (number is None or number > had):
            self.evictable_device_leaves.lower(node)

    @contextmanager
    def sparing(self, wanted_since: int | None) -> Iterator[None]:
        """Evictions leave what a request of this number or an earlier one waits for.

        Args:
            wanted_since: None spares what anybody waits for.
        """
        self._spared_since = math.inf if wanted_since is None else float(wanted_since)
        try:
            yield
        finally:
            self._spared_since = -1.0

    def spares(self, node: UnifiedTreeNode) -> bool:
        """Whether the eviction under way has to stop at this leaf."""
        since = node.item.wanted_since
        return since is not None and since <= self._spared_since

    def _new_node(self, priority: int = 0) -> UnifiedTreeNode:
        node = super()._new_node(priority=priority)
        node.item = Item(is_adapter=False, num_slots=0)  # filled in once its key is known
        return node

    def _split_node(
        self, key: RadixKey, child: UnifiedTreeNode, split_len: int
    ) -> tuple[UnifiedTreeNode, Any]:
        first, action = super()._split_node(key, child, split_len)
        if self.policy is not None:
            first.item = self.policy.split(child.item, split_len)
        return first, action

    def _unregister_node(self, node: UnifiedTreeNode) -> None:
        super()._unregister_node(node)
        self._forget(node)

    def _forget(self, node: UnifiedTreeNode) -> None:
        if self.policy is not None and node.item.num_slots and not node.item.is_adapter:
            self.policy.remove(node.item)

    def _fill(self, num_slots: int) -> None:
        if self.policy is not None:
            self.policy.advance(num_slots / self._pool_slots)

    def _add_new_node(
        self, parent: UnifiedTreeNode, key: RadixKey, value: torch.Tensor, **options: Any
    ) -> UnifiedTreeNode:
        node = super()._add_new_node(parent, key, value, **options)
        item, above = node.item, parent.item
        item.num_slots = len(value)
        if not above.is_adapter:
            item.position = above.position + above.num_slots
        if self.policy is not None:
            self.policy.create(item)
        return node


def _kind(policy: Policy, node: UnifiedTreeNode) -> int:
    item: Item = node.item
    item.backed = node.backuped
    return WANTED if item.wanted_since is not None else policy.kind(item)


def _priority(policy: Policy, node: UnifiedTreeNode) -> float:
    item: Item = node.item
    return policy.priority(item) if item.wanted_since is None else -float(item.wanted_since)
