"""The cache of one simulated server: device pool, host tier, and the tree over both.

``tree/eviction.py`` chooses the victims, as in the server; adapters are those of
``tree.AdapterTable``. In a static split KV belongs to the base model, and the pool has no adapters.

KV of an activated LoRA lies below KV of the base model, and its adapter stays on the device with
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from operator import attrgetter

from sglang_elora.control import Counters
from sglang_elora.policy import CacheEntry, Policy
from sglang_elora.sim.clairvoyant import Foreseer
from sglang_elora.sim.segment import Segment
from sglang_elora.tree import (
    MAX_REMEMBERED,
    AdapterTable,
    Eviction,
    Ghosts,
    Reason,
    Sessions,
    TierOrders,
    Victims,
)


class Cache:
    """The simulated cache. Invariant: ``free + locked + evictable == pool_slots``.

    Args:
        policy: Policy of both the device and the host tier.
        host_slots: Size of the host tier for KV; 0 for none.
    """

    def __init__(
        self, policy: Policy, adapter_table: AdapterTable, pool_slots: int, host_slots: int
    ) -> None:
        self.policy, self.adapter_table = policy, adapter_table
        self.pool_slots, self.host_slots = pool_slots, host_slots
        self.free, self.locked, self.host_free = pool_slots, 0, host_slots
        self.counts = Counters()
        self.evicted: deque[Hashable] = deque(maxlen=MAX_REMEMBERED)
        self.slots_to_host = 0  # copied by evictions; the engine reads and resets it
        self.orders = TierOrders[Segment](policy, attrgetter("on_host"))
        self.leaves, self.host_leaves = self.orders.device, self.orders.host
        self.sessions = Sessions[Segment](path_of, self.orders.set_session_state)
        self.ghosts = Ghosts(policy)
        base = adapter_table.base
        self.base = Segment(base.entry, base, on_device=True, locks=1)
        self._adapters: dict[str, Segment] = {}
        self._duplicates: dict[Segment, None] = {}  # KV on both tiers, in order
        self._lowers = isinstance(policy, Foreseer)

    @property
    def evictable(self) -> int:
        return self.pool_slots - self.free - self.locked

    def adapter(self, adapter_id: str) -> Segment:
        segment = self._adapters.get(adapter_id)
        if segment is None:
            found = self.adapter_table.get(adapter_id)
            segment = self._adapters[adapter_id] = Segment(found.entry, found)
        return segment

    def holds(self, adapter_id: str) -> bool:
        """Whether a running or waiting request needs the adapter."""
        adapter = self.adapter(adapter_id)
        return adapter.locks > 0 or adapter.entry.queue_position is not None

    def segments(self) -> list[Segment]:
        """The base model, all adapters, and all KV cached below them."""
        found = [self.base, *self._adapters.values()]
        for segment in found:  # the list grows during the iteration
            found += segment.children
        return found

    def lock(self, segment: Segment) -> None:
        """Protect a segment on the device from eviction, until ``unlock``."""
        assert segment.on_device, segment
        if segment.locks == 0:
            self.locked += segment.num_slots
            self.leaves.discard(segment)
        segment.locks += 1

    def unlock(self, segment: Segment) -> None:
        segment.locks -= 1
        if segment.locks == 0:
            self.locked -= segment.num_slots
            self._update_leaf(segment)

    def reserve(self, num_slots: int) -> None:
        """Take free slots for one running request; they are not part of the tree."""
        assert num_slots <= self.free, f"{num_slots} slots of {self.free} free"
        self.free -= num_slots
        self.locked += num_slots

    def release(self, num_slots: int) -> None:
        self.free += num_slots
        self.locked -= num_slots

    def place(self, segment: Segment) -> None:
        """Put a segment on the device, into free slots."""
        assert not segment.on_device and segment.num_slots <= self.free, segment
        assert all(above.on_device for above in self._needed_by(segment)), segment
        self.free -= segment.num_slots
        segment.on_device = True
        if segment.entry.is_adapter:
            self.adapter_table.set_resident(segment.adapter, True)
            self.counts.adapter_loads += 1
        else:
            self.adapter_table.count_kv(segment.adapter, device=segment.num_slots, host=0)
        self.policy.advance(segment.num_slots / self.pool_slots)
        if not (segment.entry.is_adapter or segment.on_host):
            self.ghosts.recall(segment.entry.group, [segment], segment.entry)
            self.policy.create(segment.entry)
        self.policy.place(segment.entry)
        for above in self._needed_by(segment):
            above.device_children += 1
            self._update_leaf(above)
        if segment.parent is not None:
            segment.parent.children[segment] = None
        self.host_leaves.discard(segment)
        if segment.on_host:
            self._duplicates[segment] = None
        self._update_leaf(segment)

    def evict(self, eviction: Eviction, *, copies: bool = True) -> int:
        """Evict until ``eviction.num_slots`` more are free.

        Args:
            copies: If False, stop at the first leaf that must be copied to the host.

        Returns:
            Number of evicted leaves.
        """
        victims = Victims(self.leaves, eviction)
        target = self.free + eviction.num_slots
        while self.free < target and (leaf := victims.next()) is not None:
            self.policy.evict(leaf.entry)
            must_copy = not (leaf.on_host or leaf.entry.is_adapter) and self._is_worth_copy(leaf)
            if must_copy and not copies:
                victims.put_back()
                break
            self._evict(leaf, must_copy, eviction.reason)
        victims.close()
        return victims.num_taken

    def copy_ahead(self, most_leaves: int) -> int:
        """Copy up to ``most_leaves`` next victims to the host; returns the slots copied."""
        found = self.orders.next_victims(
            most_leaves,
            lambda leaf: not (leaf.on_host or leaf.entry.is_adapter) and self._is_worth_copy(leaf),
        )
        return sum(leaf.num_slots for leaf in found if self._to_host(leaf))

    def _update_leaf(self, segment: Segment) -> None:
        if segment.on_device and segment.locks == 0 and segment.device_children == 0:
            self.leaves.add(segment)
            if self._lowers:
                self.leaves.lower(segment)
        else:
            self.leaves.discard(segment)

    def _evict(self, leaf: Segment, must_copy: bool, reason: Reason) -> None:
        if leaf.entry.is_adapter:
            self.adapter_table.set_resident(leaf.adapter, False)
            self.counts.adapter_evictions[reason] += 1
        elif must_copy and self._to_host(leaf):
            self.slots_to_host += leaf.num_slots
        self._leave_device(leaf, reason)
        if leaf.on_host or leaf.entry.is_adapter:
            self.evicted.append(leaf)
        if leaf.on_host:
            self._update_host_leaf(leaf)
        elif not leaf.entry.is_adapter:
            self._drop(leaf)

    def _leave_device(self, leaf: Segment, reason: Reason) -> None:
        self.leaves.discard(leaf)
        self._duplicates.pop(leaf, None)
        self.policy.displace(leaf.entry)
        leaf.on_device = False
        self.free += leaf.num_slots
        if not leaf.entry.is_adapter:
            self.adapter_table.count_kv(leaf.adapter, device=-leaf.num_slots, host=0)
            self.counts.kv_slots_evicted[reason] += leaf.num_slots
        for above in self._needed_by(leaf):
            above.device_children -= 1
            self._update_leaf(above)

    def _needed_by(self, segment: Segment) -> list[Segment]:
        """What must be on the device while this segment is."""
        if segment.parent is None:
            return []
        if segment.parent.adapter is segment.adapter:
            return [segment.parent]
        return [segment.parent, self.adapter(str(segment.adapter.adapter_id))]

    def _is_worth_copy(self, leaf: Segment) -> bool:
        return self.host_slots > 0 and self.orders.is_worth_host_copy(
            leaf,
            has_children=bool(leaf.children),
            has_room=lambda: self.host_free >= leaf.num_slots,
        )

    def _to_host(self, leaf: Segment) -> bool:
        """Copy KV to the host, evicting the lowest-ranked KV there; False if it does not fit."""
        if self.host_free < leaf.num_slots:
            self._drop_duplicates(leaf.num_slots)
            self.host_leaves.refresh()
            while self.host_free < leaf.num_slots:
                least = self.host_leaves.take_lowest()
                if least is None:
                    break
                self._leave_host(least)
                self._drop(least)
            self.host_leaves.give_back()
        if self.host_free < leaf.num_slots:
            return False
        self.host_free -= leaf.num_slots
        leaf.on_host = True
        self.adapter_table.count_kv(leaf.adapter, device=0, host=leaf.num_slots)
        self.counts.kv_slots_to_host += leaf.num_slots
        self.policy.displace(leaf.entry)
        leaf.entry.backed = True
        self.policy.place(leaf.entry)
        self._duplicates[leaf] = None
        if leaf in self.leaves:
            self.leaves.lower(leaf)
        return True

    def _drop_duplicates(self, num_slots: int) -> None:
        """Free ``num_slots`` on the host by dropping copies of KV that is also on the device, those
        of evictable leaves last: as SGLang's ``_reclaim_full_host_duplicates``."""
        for spares_leaves in (True, False):
            for segment in list(self._duplicates):
                if self.host_free >= num_slots:
                    return
                if not (spares_leaves and segment in self.leaves):
                    del self._duplicates[segment]
                    self.policy.displace(segment.entry)
                    self._leave_host(segment)
                    self.policy.place(segment.entry)

    def _leave_host(self, segment: Segment) -> None:
        self.host_leaves.discard(segment)
        segment.on_host = segment.entry.backed = False
        self.host_free += segment.num_slots
        self.adapter_table.count_kv(segment.adapter, device=0, host=-segment.num_slots)

    def _update_host_leaf(self, segment: Segment) -> None:
        if segment.on_host and not segment.on_device and not segment.children:
            self.host_leaves.add(segment)
            if self._lowers:
                self.host_leaves.lower(segment)

    def _drop(self, segment: Segment) -> None:
        """Remove a segment that is on no tier, and its descendants, which are unreachable now."""
        for child in list(segment.children):
            self._leave_host(child)
            self._drop(child)
        self.ghosts.add(segment.entry.group, segment, segment.entry)
        self.sessions.drop(segment)
        segment.num_sessions = 0
        group, is_activated = segment.entry.group, segment.entry.is_activated
        segment.entry = CacheEntry(  # for when it is cached again
            False, segment.num_slots, group, is_activated
        )
        if segment.parent is not None:
            segment.parent.children.pop(segment, None)
            self._update_host_leaf(segment.parent)

    def check_invariants(self, reserved: int) -> None:
        """Recompute sums and leaves from all segments, and compare.

        Args:
            reserved: Slots reserved by running requests.

        Raises:
            AssertionError: A sum or the set of leaves differs.
        """
        segments = self.segments()
        device = [segment for segment in segments if segment.on_device]
        locked = sum(s.num_slots for s in device if s.locks) + reserved
        assert self.free == self.pool_slots - reserved - sum(s.num_slots for s in device)
        assert self.free >= 0 and self.host_free >= 0
        assert self.locked == locked, (self.locked, locked)
        held = sum(s.num_slots for s in segments if s.on_host and not s.entry.is_adapter)
        assert self.host_free == self.host_slots - held
        needed = [above for segment in device for above in self._needed_by(segment)]
        assert all(above.on_device for above in needed), "KV without what is above"
        leaves = {s for s in device if not s.locks and not s.device_children}
        assert set(self.leaves) == leaves, (len(self.leaves), len(leaves))
        self.adapter_table.check_invariants()
        self.policy.check_invariants([segment.entry for segment in device])
        self.leaves.check_invariants()


def path_of(segment: Segment) -> list[Segment]:
    """The path from a segment up to its adapter; for KV of the base model, without that."""
    path = [segment]
    while (above := path[-1].parent) is not None and not above.is_base:
        path.append(above)
    return path
