"""The planner's interface to a simulated server's pool, host memory and link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import CacheEntry
from sglang_elora.sim.cache import Cache, path_of
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.images import Images
from sglang_elora.sim.link import Link
from sglang_elora.sim.segment import Segment
from sglang_elora.tree import Eviction


@dataclass(slots=True)
class _Copy:
    """A running copy of an adapter; in the simulation every rank confirms it immediately."""

    num_slots: int
    launches_before: int
    end_s: float
    confirmed: bool = True


class PoolMemory:
    """Simulated ``swapper.memory.Memory``. Keys of nodes are the segments themselves.

    Args:
        cache: Pool, host tier for KV, and tree.
        link: Link to the device.
        costs: Receives the durations of copies.
    """

    def __init__(
        self, cache: Cache, calibration: Calibration, link: Link, costs: OnlineCosts
    ) -> None:
        self.cache, self.adapter_table, self.policy = cache, cache.adapter_table, cache.policy
        self.pool_slots, self.counts = cache.pool_slots, cache.counts
        self.copies: dict[str, _Copy] = {}
        self.num_launches = self.num_loads = 0
        self.now_s = 0.0
        self._calibration, self._link, self._costs = calibration, link, costs
        self._images = Images(cache, calibration)
        self._to_host_free_s = 0.0

    @property
    def next_s(self) -> float:
        """The time at which the next copy or read ends."""
        copied_s = min((copy.end_s for copy in self.copies.values()), default=math.inf)
        return min(copied_s, self._images.next_s)

    def settle(self, now_s: float) -> None:
        """Complete the copies and reads that have ended by now."""
        self.now_s = now_s
        for adapter_id in [a for a, copy in self.copies.items() if copy.end_s <= now_s]:
            del self.copies[adapter_id]
            self._images.release(adapter_id)
            self.cache.unlock(self.cache.adapter(adapter_id))
        self._images.settle(now_s)

    def refresh_order(self) -> None:
        self.cache.orders.refresh()

    def is_there(self, adapter: Segment) -> bool:
        """Whether an adapter is on the device and its copy is complete."""
        return adapter.on_device and str(adapter.entry.group) not in self.copies

    def copied_s(self, adapter_id: str, now_s: float) -> float:
        """The time at which an adapter's copy ends; ``now_s`` if none is running."""
        copy = self.copies.get(adapter_id)
        return now_s if copy is None else copy.end_s

    # ==== swapper.memory.Memory ====

    @property
    def reading(self) -> Collection[str]:
        return self._images.reading

    @property
    def evicted(self) -> deque[Hashable]:
        return self.cache.evicted

    @property
    def is_loading_kv(self) -> bool:
        return self._link.kv_free_s > self.now_s

    @property
    def may_copy_to_host(self) -> bool:
        return self.cache.host_slots > 0 and self._to_host_free_s <= self.now_s

    def free_slots(self) -> int:
        return self.cache.free

    def evictable_slots(self) -> int:
        return self.cache.evictable

    def node_of(self, adapter_id: str) -> Segment:
        return self.cache.adapter(adapter_id)

    def is_usable(self, adapter_id: str) -> bool:
        return self.cache.adapter(adapter_id).on_device

    def is_on_host(self, adapter_id: str) -> bool:
        return adapter_id in self._images

    def find(self, key: Segment) -> Segment | None:
        return key if key.is_cached or key.entry.is_adapter else None

    def session_end(self, session: str) -> Segment | None:
        return self.cache.sessions.end_of(session)

    def is_loadable(self, node: Segment) -> bool:
        has_parent = node.parent is None or node.parent.on_device
        return node.on_host and not node.on_device and has_parent

    def is_on_device(self, node: Segment) -> bool:
        return node.on_device

    def unqueue(self, adapter_id: str) -> None:
        self.cache.orders.set_queue_position(self.cache.adapter(adapter_id), None)
        self._images.lower(adapter_id)

    def evict(self, eviction: Eviction) -> int:
        return self.cache.evict(eviction)

    def evict_without_copies(self, eviction: Eviction) -> int:
        return self.cache.evict(eviction, copies=False)

    def start_copy(self, adapter_id: str) -> bool:
        cache, adapter = self.cache, self.cache.adapter(adapter_id)
        if cache.free < adapter.num_slots:
            return False
        cache.place(adapter)
        cache.lock(adapter)
        self._images.hold(adapter_id)
        begun_s = max(self.now_s, self._link.free_s)
        copies = self._calibration.copies_per_adapter
        end_s = self._link.copy(self.now_s, adapter.num_slots, copies)
        self._costs.copied(adapter.num_slots, end_s - begun_s)
        self.copies[adapter_id] = _Copy(adapter.num_slots, self.num_launches, end_s)
        self.num_loads += 1
        return True

    def read(self, adapter_id: str) -> None:
        self._images.read(adapter_id, self.now_s)

    def read_first(self, adapter_id: str) -> None:
        self._images.read_first(adapter_id)

    def read_ahead(self) -> None:
        self._images.read_ahead(self.now_s)

    def load_kv(self, node: Segment, eviction: Eviction | None) -> Sequence[CacheEntry]:
        path = [node] if eviction is None else path_of(node)
        missing = [segment for segment in path if not segment.on_device]
        held = [segment for segment in path if segment.on_device]
        if not all(segment.on_host for segment in missing):
            return []
        num_slots = sum(segment.num_slots for segment in missing)
        shortfall = num_slots - self.cache.free
        if shortfall > 0 and eviction is not None:
            for segment in held:
                self.cache.lock(segment)
            self.cache.evict(eviction.freeing(shortfall))
            for segment in held:
                self.cache.unlock(segment)
        if self.cache.free < num_slots:
            return []
        for segment in reversed(missing):
            self.cache.place(segment)
        self._link.load_kv(self.now_s, num_slots)
        return [segment.entry for segment in missing]

    def copy_ahead(self, most_leaves: int) -> bool:
        num_slots = self.cache.copy_ahead(most_leaves)
        self._to_host_free_s = self.now_s + self._calibration.to_host_s(num_slots)
        return num_slots > 0
