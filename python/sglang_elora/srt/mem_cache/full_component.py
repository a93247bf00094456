"""The tree's component of full attention: eviction in order, KV counted per adapter."""

from __future__ import annotations

import heapq
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.unified_cache.cache_action import (
    ComponentAction,
    FreeComponentDeviceSlot,
)
from sglang.srt.mem_cache.unified_cache.components.base import (
    CacheTransferPhase,
    EvictLayer,
)
from sglang.srt.mem_cache.unified_cache.components.full import FullComponent
from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId, UnifiedTreeNode
from typing_extensions import override

from sglang_elora.srt.mem_cache.freed import Actions, Slots, Tracker
from sglang_elora.tree import LeafOrder

ORDERED_POLICIES = frozenset({"lru", "lfu", "fifo", "slru"})
"""Values of --radix-eviction-policy under which a node's priority never falls while it is cached.

Under the others (mru, filo, priority, tlru), and with sessions in the radix cache, SGLang's scan of
all leaves stays.
"""


class EloraFullComponent(FullComponent):
    """Full attention: takes eviction victims from the order instead of sorting all leaves."""

    def __init__(self, cache: Any, params: Any) -> None:
        super().__init__(cache, params)
        self._stock_order = (
            params.eviction_policy.lower() in ORDERED_POLICIES
            and not params.enable_session_radix_cache
        )
        self._tokens_wanted = 0
        self._wanted: list[tuple[int, NodeId]] = []  # leaves that waiting requests need
        self.spared_since = -1
        self.leaves_left = sys.maxsize
        self.spares_adapters = False
        self._leaves_per_step = 1

    @contextmanager
    def sparing(
        self, wanted_since: int, most_leaves: int, *, adapters: bool = False
    ) -> Iterator[None]:
        """Evictions leave what a request at this place in the queue, or an earlier one, needs.

        They take ``most_leaves`` at most; ``leaves_left`` tells how many of these are left. With
        ``adapters`` they end where an adapter is next.
        """
        self.spared_since, self.leaves_left = wanted_since, most_leaves
        self.spares_adapters = adapters
        try:
            yield
        finally:
            self.spared_since, self.leaves_left = -1, sys.maxsize
            self.spares_adapters = False

    @contextmanager
    def in_one_step(self) -> Iterator[None]:
        """A step of an eviction takes all that is wanted, where SGLang's walk asks after each leaf
        whether it was enough. Its end is marked by the next leaf that has to be copied first."""
        self._leaves_per_step = sys.maxsize
        try:
            yield
        finally:
            self._leaves_per_step = 1

    @property
    def host_room(self) -> int:
        """Tokens that fit into the host tier."""
        return int(self._full_kv_pool_host.available_size())

    @property
    def keeps_order(self) -> bool:
        return self._stock_order or self.tree_core.policy is not None

    @override
    def evict_component(
        self,
        node: UnifiedTreeNode,
        device_frees: Slots,
        host_frees: Slots,
        cache_actions: Actions,
        target: EvictLayer = EvictLayer.DEVICE,
    ) -> tuple[int, int]:
        device, host = super().evict_component(
            node, device_frees, host_frees, cache_actions, target
        )
        self.tree_core.count_kv(node, device=-device, host=-host)
        return device, host

    @override
    def commit_hicache_transfer(
        self,
        node: UnifiedTreeNode,
        phase: CacheTransferPhase,
        transfers: Sequence[PoolTransfer] = (),
        **options: Any,
    ) -> None:
        super().commit_hicache_transfer(node, phase, transfers, **options)
        if not transfers:
            return
        moved = transfers[0]
        counts = self.tree_core.counts
        if phase == CacheTransferPhase.BACKUP_HOST and moved.host_indices is not None:
            counts["kv_slots_to_host"] += len(moved.host_indices)
            self.tree_core.count_kv(node, host=len(moved.host_indices))
            if self.keeps_order:  # to lose it costs less now
                self._order(self.tree_core.evictable_device_leaves).lower(node)
        if phase == CacheTransferPhase.LOAD_BACK and moved.device_indices is not None:
            counts["kv_slots_from_host"] += len(moved.device_indices)
            for node_id in moved.nodes_to_load or ():
                loaded = self.tree_core.node_by_id(node_id)
                num_tokens = len(loaded.component_data[self.component_type].value)
                self.tree_core.count_kv(loaded, device=num_tokens)

    @override
    def _evict_device_start(self, request_cnt: int) -> None:
        if not self.keeps_order:
            super()._evict_device_start(request_cnt)
            return
        self._tokens_wanted = request_cnt

    @override
    def _evict_device_next_node(
        self,
        tracker: Tracker,
        device_frees: Slots,
        host_frees: Slots,
        cache_actions: Actions,
    ) -> NodeId | None:
        freed = (tracker, device_frees, host_frees, cache_actions)
        if not self.keeps_order:
            return super()._evict_device_next_node(*freed)
        most_leaves = min(self._leaves_per_step, self.leaves_left)
        while tracker[self.component_type] < self._tokens_wanted and most_leaves:
            leaf = self._next_leaf()
            if leaf is None:
                break
            self.leaves_left -= 1
            most_leaves -= 1
            # SGLang's caller reads progress off the tracker as well.
            if not self.tree_core.evict_at_once(leaf, freed):
                return leaf.id
        return None

    def _next_leaf(self) -> UnifiedTreeNode | None:
        """The lowest leaf that no waiting request needs, then those that the last of them need."""
        leaves = self._order(self.tree_core.evictable_device_leaves)
        while (leaf := leaves.take_lowest()) is not None:
            since = leaf.item.wanted_since
            if since is None:
                return None if self.spares_adapters and leaf.item.is_adapter else leaf
            heapq.heappush(self._wanted, (-since, leaf.id))
        while self._wanted and -self._wanted[0][0] > self.spared_since:
            leaf = self.tree_core.node_by_id(heapq.heappop(self._wanted)[1])
            if leaf in leaves:
                return leaf
        return None

    @override
    def _evict_device_end(self) -> None:
        if not self.keeps_order:
            super()._evict_device_end()
            return
        self._order(self.tree_core.evictable_device_leaves).give_back()
        self._wanted.clear()

    @override
    def drive_host_eviction(
        self,
        num_tokens: int,
        tracker: Tracker,
        device_frees: Slots,
        host_frees: Slots,
        cache_actions: Actions,
    ) -> None:
        """Free host tokens, leaf by leaf in eviction order, until ``num_tokens`` are free."""
        freed = (tracker, device_frees, host_frees, cache_actions)
        if not self.keeps_order:
            super().drive_host_eviction(num_tokens, *freed)
            return
        leaves = self._order(self.tree_core.evictable_host_leaves)
        leaves.refresh()
        while tracker[self.component_type] < num_tokens:
            leaf = leaves.take_lowest()
            if leaf is None:
                break
            self.tree_core._evict_host_leaf(leaf, *freed)
        leaves.give_back()

    @override
    def apply_component_action(self, action: ComponentAction) -> None:
        if isinstance(action, FreeComponentDeviceSlot) and len(action.indices) > 1:
            # Whole pages each, so they are one segment; the allocator copies its list per segment.
            action = FreeComponentDeviceSlot(
                [torch.cat(action.indices)], component_type=action.component_type
            )
        super().apply_component_action(action)

    @staticmethod
    def _order(leaves: set[UnifiedTreeNode]) -> LeafOrder[UnifiedTreeNode]:
        return cast("LeafOrder[UnifiedTreeNode]", leaves)


def evict_without_copies(cache: Any, num_tokens: int) -> tuple[int, bool]:
    """Evict in one step, until a leaf has to be copied to the host first.

    SGLang's walk, which takes twice as long, is there for the rest.

    Args:
        cache: A ``UnifiedRadixCache`` over an ``EloraTreeCore``.

    Returns:
        Tokens that were freed, and whether such a leaf is next.
    """
    started_s = time.perf_counter()
    full: EloraFullComponent = cache.tree_core.full
    tracker: Tracker = defaultdict(int)
    full.evict_device_start(num_tokens)
    try:
        with full.in_one_step():
            next_id, _ = cache._evict_device_next_node(full.component_type, tracker)
    finally:
        full.evict_device_end()
    if next_id is not None:
        full.leaves_left += 1  # it will be taken again
    cache.update_eviction_metrics(tracker[full.component_type], started_s)
    return tracker[full.component_type], next_id is not None
