"""The planner's view of a scheduler: its tree, pools, images and copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sglang_elora.policy import CacheEntry, Policy
from sglang_elora.srt.mem_cache.adapter_node import FULL, AdapterNode
from sglang_elora.srt.mem_cache.full_component import evict, evict_without_copies
from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.tree import Eviction, adapter_of, is_activated

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId, UnifiedTreeNode


class SchedulerMemory:
    """Implements ``swapper.memory.Memory``. Keys of nodes are SGLang's node ids.

    Args:
        residency: The adapters on the device and their images, over the cache.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._cache, self._core, self._host = residency.cache, residency.core, residency.host
        self.adapter_table, self.pool_slots = residency.adapter_table, residency.pool_slots
        self.copies, self.counts = residency.copies, residency.core.counts
        self.evicted: deque[Hashable] = residency.core.evicted
        # Called for each queued request: without a call in between.
        self.free_slots: Callable[[], int] = residency.allocator.available_size
        self.evictable_slots: Callable[[], int] = residency.core.evictable_size
        self.node_of = residency.core.node_of
        assert residency.core.policy is not None
        self.policy: Policy = residency.core.policy

    @property
    def num_launches(self) -> int:
        return self._residency.num_launches

    @property
    def reading(self) -> Collection[str]:
        return self._host.reading

    @property
    def is_loading_kv(self) -> bool:
        return bool(self._cache.ongoing_load_back)

    @property
    def may_copy_to_host(self) -> bool:
        return bool(self._core.is_write_back) and not self._cache.ongoing_write_through

    def is_usable(self, adapter_id: str) -> bool:
        return self._residency.is_usable(self.adapter_table.get(adapter_id))

    def is_on_host(self, adapter_id: str) -> bool:
        return adapter_id in self._host

    def find(self, key: NodeId) -> UnifiedTreeNode | None:
        return self._core.find(key)

    def session_end(self, session: str) -> Hashable | None:
        end = self._core.sessions.end_of(session)
        return None if end is None else end.id

    def is_loadable(self, node: UnifiedTreeNode) -> bool:
        parent: Any = node.parent
        # The value of an adapter that is not on the device is empty, not None, and so is that of
        # the root of the base model.
        if not node.evicted or not node.backuped or parent.component_data[FULL].value is None:
            return False
        if is_activated(node.key.extra_key):  # its adapter's node is not above it
            return self.is_usable(str(adapter_of(node.key.extra_key)))
        return not isinstance(parent, AdapterNode) or self._residency.is_usable(parent.adapter)

    def is_on_device(self, node: UnifiedTreeNode) -> bool:
        return not node.evicted

    def unqueue(self, adapter_id: str) -> None:
        self._host.cancel(adapter_id)
        if adapter_id in self.adapter_table:
            assert self._core.orders is not None
            self._core.orders.set_queue_position(self._core.node_of(adapter_id), None)
            self._host.lower(adapter_id)

    def evict(self, eviction: Eviction) -> int:
        return evict(self._cache, eviction).num_leaves

    def evict_without_copies(self, eviction: Eviction) -> int:
        return evict_without_copies(self._cache, eviction).num_leaves

    def start_copy(self, adapter_id: str) -> bool:
        return self._residency.start_copy(adapter_id)

    def read(self, adapter_id: str) -> None:
        self._host.request(adapter_id)

    def read_first(self, adapter_id: str) -> None:
        self._host.read_first(adapter_id)

    def read_ahead(self) -> None:
        self._host.read_ahead()

    def load_kv(self, node: UnifiedTreeNode, eviction: Eviction | None) -> Sequence[CacheEntry]:
        missing = [n.entry for n in self._core.path_of(node) if n.evicted]
        with nullcontext() if eviction is None else self._core.evicting(eviction):
            if not self._cache.load_back(node.id):
                return []
        self._cache.start_loads()
        return missing

    def copy_ahead(self, most_leaves: int) -> bool:
        copies = self._core.copies_ahead(most_leaves)
        for copy in copies:
            num_slots = self._cache._execute_and_commit_kv_backup(copy)
            self.counts.kv_slots_copied_ahead += num_slots
        self._cache.flush_pending_backups()
        return bool(copies)
