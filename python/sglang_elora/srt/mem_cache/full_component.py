"""The full-attention component of the tree: evicts in the kept order, counts KV per adapter."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    EvictParams,
    IncLockRefResult,
)
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
from sglang_elora.tree import Eviction, EvictionOrder, Victims, is_activated

ORDERED_POLICIES = frozenset({"lru", "lfu", "fifo", "slru"})
"""Values of --radix-eviction-policy under which a node's priority never falls while it is cached.

Under the other values (mru, filo, priority, tlru), and with --enable-session-radix-cache, SGLang's
scan of all leaves is used.
"""


class EloraFullComponent(FullComponent):
    """The full-attention component, which takes victims from the kept eviction order instead of
    sorting all leaves."""

    def __init__(self, cache: Any, params: Any) -> None:
        super().__init__(cache, params)
        self._stock_order = (
            params.eviction_policy.lower() in ORDERED_POLICIES
            and not params.enable_session_radix_cache
        )
        self._tokens_wanted = 0
        self._victims: Victims[UnifiedTreeNode] | None = None  # of the current or last eviction
        self._leaves_per_step = 1

    @contextmanager
    def in_one_step(self) -> Iterator[None]:
        """Within this block one step of an eviction takes as many leaves as are needed, up to one
        that has to be copied to the host first. SGLang's walk takes one leaf per step."""
        self._leaves_per_step = sys.maxsize
        try:
            yield
        finally:
            self._leaves_per_step = 1

    @property
    def num_taken(self) -> int:
        """Number of leaves that the last eviction took."""
        return 0 if self._victims is None else self._victims.num_taken

    @property
    def host_room(self) -> int:
        """Number of tokens for which the host tier has room."""
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
            counts.kv_slots_to_host += len(moved.host_indices)
            self.tree_core.count_kv(node, host=len(moved.host_indices))
            if self.keeps_order:  # with a host copy its eviction costs less
                self._order(self.tree_core.evictable_device_leaves).lower(node)
        if phase == CacheTransferPhase.LOAD_BACK and moved.device_indices is not None:
            counts.kv_slots_from_host += len(moved.device_indices)
            for node_id in moved.nodes_to_load or ():
                loaded = self.tree_core.node_by_id(node_id)
                num_tokens = len(loaded.component_data[self.component_type].value)
                self.tree_core.count_kv(loaded, device=num_tokens)

    def lock_adapters(self) -> None:
        """From now on lock the adapter of activated KV with it: its node is not on the path.

        Called for the first activated adapter; without any, a lock takes no longer than SGLang's.
        """
        self.acquire_component_lock = self._acquire_with_adapter
        self.release_component_lock = self._release_with_adapter

    def _acquire_with_adapter(
        self, node: UnifiedTreeNode, result: IncLockRefResult, lock_host: bool = False
    ) -> IncLockRefResult:
        if is_activated(node.key.extra_key) and not lock_host:
            self.tree_core.inc_full_pin(self.tree_core.adapter_node_of(node).id)
        return super().acquire_component_lock(node, result, lock_host)

    def _release_with_adapter(
        self, node: UnifiedTreeNode, params: DecLockRefParams, lock_host: bool = False
    ) -> None:
        super().release_component_lock(node, params, lock_host)
        if is_activated(node.key.extra_key) and not lock_host:
            self.tree_core.dec_full_pin(self.tree_core.adapter_node_of(node).id)

    @override
    def _evict_device_start(self, request_cnt: int) -> None:
        if not self.keeps_order:
            super()._evict_device_start(request_cnt)
            return
        self._tokens_wanted = request_cnt
        eviction = self.tree_core.eviction or Eviction(request_cnt)
        self._victims = Victims(self._order(self.tree_core.evictable_device_leaves), eviction)

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
        assert self._victims is not None
        next_leaf, evict_at_once = self._victims.next, self.tree_core.evict_at_once
        most_leaves, kind = self._leaves_per_step, self.component_type
        while most_leaves and tracker[kind] < self._tokens_wanted:
            leaf = next_leaf()
            if leaf is None:
                break
            most_leaves -= 1
            # SGLang's caller also reads the progress from the tracker.
            if not evict_at_once(leaf, freed):
                return leaf.id
        return None

    @override
    def _evict_device_end(self) -> None:
        if not self.keeps_order:
            super()._evict_device_end()
            return
        victims, core = self._victims, self.tree_core
        assert victims is not None
        victims.close()
        if core.eviction is not None:  # SGLang may evict several times for one load
            core.eviction = core.eviction.freeing(core.eviction.num_slots, victims.num_left)

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
            # Merged into one segment: the allocator copies its free list once per segment.
            action = FreeComponentDeviceSlot(
                [torch.cat(action.indices)], component_type=action.component_type
            )
        super().apply_component_action(action)

    @staticmethod
    def _order(leaves: set[UnifiedTreeNode]) -> EvictionOrder[UnifiedTreeNode]:
        return cast("EvictionOrder[UnifiedTreeNode]", leaves)


@dataclass(frozen=True, slots=True)
class Evicted:
    """Result of an eviction.

    Attributes:
        num_slots: Device slots that were freed.
        num_leaves: Leaves that were evicted.
        is_stuck: Whether it ended because the next leaf has to be copied to the host first.
    """

    num_slots: int
    num_leaves: int
    is_stuck: bool = False


def evict(cache: Any, eviction: Eviction) -> Evicted:
    """Evict from the device, copying KV to the host where that is worth it.

    Args:
        cache: A ``UnifiedRadixCache`` over an ``EloraTreeCore``.
    """
    done = evict_without_copies(cache, eviction)
    if not done.is_stuck:
        return done
    core = cache.tree_core
    left = eviction.max_leaves - done.num_leaves
    rest = eviction.freeing(eviction.num_slots - done.num_slots, left)
    with core.evicting(rest):
        result = cache.evict(EvictParams(num_tokens=rest.num_slots))
    return Evicted(
        done.num_slots + result.num_tokens_evicted, done.num_leaves + core.full.num_taken
    )


def evict_without_copies(cache: Any, eviction: Eviction) -> Evicted:
    """Evict in one step, up to the first leaf that has to be copied to the host first.

    This takes half the time of SGLang's walk, which ``evict`` uses for the remaining leaves.
    """
    started_s = time.perf_counter()
    core = cache.tree_core
    full: EloraFullComponent = core.full
    tracker: Tracker = defaultdict(int)
    with core.evicting(eviction):
        full.evict_device_start(eviction.num_slots)
        try:
            with full.in_one_step():
                next_id, _ = cache._evict_device_next_node(full.component_type, tracker)
        finally:
            full.evict_device_end()
    num_slots = tracker[full.component_type]
    cache.update_eviction_metrics(num_slots, started_s)
    return Evicted(num_slots, full.num_taken - (next_id is not None), next_id is not None)
