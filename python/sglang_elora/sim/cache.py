"""The cache of one simulated server: device pool, host tier, and the tree over both.

The order of eviction is a policy's, kept by ``tree.LeafOrder``; adapters are those of
``tree.AdapterForest``. Where KV hangs under the base model (a static split), there are no adapters
in the pool.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Hashable
from typing import Any

from sglang_elora.policy import Expectation, Item, Policy
from sglang_elora.sim.clairvoyant import Clairvoyant
from sglang_elora.sim.segment import Segment
from sglang_elora.tree import AdapterForest, LeafOrder, Sessions

_WANTED = "wanted"
_REMEMBERED = 8192  # evictions that prefetching may undo, as in the server


class Cache:
    """``free + locked + evictable == pool_slots`` at every moment.

    Args:
        policy: Of the device, and of the host tier.
        host_slots: For KV; 0 for no host tier.
    """

    def __init__(
        self, policy: Policy, forest: AdapterForest, pool_slots: int, host_slots: int
    ) -> None:
        self.policy, self.forest = policy, forest
        self.pool_slots, self.host_slots = pool_slots, host_slots
        self.free, self.locked, self.host_free = pool_slots, 0, host_slots
        self.counts: Counter[str] = Counter()
        self.evicted: deque[Segment] = deque(maxlen=_REMEMBERED)
        self.slots_to_host = 0  # copied by evictions since somebody asked last
        self.sessions = Sessions[Segment](self._path_of, self._expect)
        self._adapters: dict[str, Segment] = {}
        self._duplicates: dict[Segment, None] = {}  # KV on both tiers, in order
        self._lowers = isinstance(policy, Clairvoyant)
        self.leaves: LeafOrder[Segment] = LeafOrder(
            lambda segment: policy.priority(segment.item),
            self._kind,
            lambda kind, lowest: math.inf if kind == _WANTED else policy.rank(kind, lowest),
        )
        self.host_leaves: LeafOrder[Segment] = LeafOrder(
            lambda segment: policy.priority(segment.item),
            lambda segment: policy.host_kind(segment.item),
            policy.host_rank,
        )

    @property
    def evictable(self) -> int:
        return self.pool_slots - self.free - self.locked

    def adapter(self, uid: str) -> Segment:
        segment = self._adapters.get(uid)
        if segment is None:
            found = self.forest.get(uid)
            segment = self._adapters[uid] = Segment(found.item, found)
        return segment

    def holds(self, uid: str) -> bool:
        """Whether an adapter cannot leave, or should not: a request uses it or waits for it."""
        adapter = self.adapter(uid)
        return adapter.locks > 0 or adapter.item.wanted_since is not None

    def segments(self) -> list[Segment]:
        """Adapters, and all that is cached below them."""
        found = list(self._adapters.values())
        for segment in found:  # grows while it is read
            found += segment.children
        return found

    def lock(self, segment: Segment) -> None:
        """It is on the device and stays there."""
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
        """Slots of a running request, which nobody else sees; they are free."""
        assert num_slots <= self.free, f"{num_slots} slots of {self.free} free"
        self.free -= num_slots
        self.locked += num_slots

    def release(self, num_slots: int) -> None:
        self.free += num_slots
        self.locked -= num_slots

    def place(self, segment: Segment) -> None:
        """It comes to the device, into free slots."""
        assert not segment.on_device and segment.num_slots <= self.free, segment
        assert segment.parent is None or segment.parent.on_device, segment
        self.free -= segment.num_slots
        segment.on_device = True
        if segment.item.is_adapter:
            self.forest.set_resident(segment.adapter, True)
            self.counts["adapter_loads"] += 1
        else:
            self.forest.count_kv(segment.adapter, device=segment.num_slots, host=0)
        self.policy.advance(segment.num_slots / self.pool_slots)
        if not (segment.item.is_adapter or segment.on_host):
            self.policy.create(segment.item)
        self.policy.place(segment.item)
        if segment.parent is not None:
            segment.parent.device_children += 1
            segment.parent.children[segment] = None
            self._update_leaf(segment.parent)
        self.host_leaves.discard(segment)
        if segment.on_host:
            self._duplicates[segment] = None
        self._update_leaf(segment)

    def make_room(self, num_slots: int, spared_since: int = -1) -> bool:
        """Evict until so many are free; nothing that waiting request ``spared_since`` needs, or an
        earlier one."""
        wanted: list[tuple[int, int, Segment]] = []
        while self.free < num_slots:
            leaf = self._next_leaf(wanted, spared_since)
            if leaf is None:
                break
            self._evict(leaf)
        self.leaves.give_back()
        return self.free >= num_slots

    def keep_room(self, num_slots: int, most_leaves: int) -> bool:
        """Evict KV that goes next and need not be copied first, a few leaves of it."""
        has_evicted = False
        for _ in range(most_leaves):
            if self.free >= num_slots:
                break
            leaf = self.leaves.take_lowest()
            if leaf is None or leaf.item.wanted_since is not None or leaf.item.is_adapter:
                break
            if not leaf.on_host and self._is_worth_copy(leaf):
                break
            self._evict(leaf)
            has_evicted = True
        self.leaves.give_back()
        return has_evicted

    def copy_ahead(self, most_leaves: int) -> int:
        """Copy what goes next to the host. Slots that were copied."""
        found: list[Segment] = []
        for _ in range(most_leaves):
            leaf = self.leaves.take_lowest()
            if leaf is None or leaf.item.wanted_since is not None:
                break
            if not (leaf.on_host or leaf.item.is_adapter) and self._is_worth_copy(leaf):
                found.append(leaf)
        self.leaves.give_back()
        return sum(leaf.num_slots for leaf in found if self._to_host(leaf))

    def set_wanted(self, segment: Segment, since: int | None) -> None:
        segment.item.wanted_since = since
        if since is None and segment in self.leaves:
            self.leaves.lower(segment)

    @staticmethod
    def _path_of(segment: Segment) -> list[Segment]:
        path = [segment]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path

    def _expect(self, segment: Segment, expectation: Expectation) -> None:
        """As ``OrderedTreeCore.expect``."""
        if segment.item.expectation == expectation:
            return
        self.policy.expect(segment.item, expectation)
        for order in (self.leaves, self.host_leaves):
            if segment in order:
                order.lower(segment)

    def _kind(self, segment: Segment) -> Hashable:
        item = segment.item
        return _WANTED if item.wanted_since is not None else self.policy.kind(item)

    def _update_leaf(self, segment: Segment) -> None:
        if segment.on_device and segment.locks == 0 and segment.device_children == 0:
            self.leaves.add(segment)
            if self._lowers:
                self.leaves.lower(segment)
        else:
            self.leaves.discard(segment)

    def _next_leaf(self, wanted: list[Any], spared_since: int) -> Segment | None:
        while (leaf := self.leaves.take_lowest()) is not None:
            since = leaf.item.wanted_since
            if since is None:
                return leaf
            heapq.heappush(wanted, (-since, len(wanted), leaf))
        if wanted and -wanted[0][0] > spared_since:
            last: Segment = heapq.heappop(wanted)[2]
            return last
        return None

    def _evict(self, leaf: Segment) -> None:
        self.policy.evict(leaf.item)
        if leaf.item.is_adapter:
            self.forest.set_resident(leaf.adapter, False)
            self.counts["adapter_evictions"] += 1
        elif not leaf.on_host and self._is_worth_copy(leaf) and self._to_host(leaf):
            self.slots_to_host += leaf.num_slots
        self._leave_device(leaf)
        if leaf.on_host or leaf.item.is_adapter:
            self.evicted.append(leaf)
        if leaf.on_host:
            self._update_host_leaf(leaf)
        elif not leaf.item.is_adapter:
            self._drop(leaf)

    def _leave_device(self, leaf: Segment) -> None:
        self.leaves.discard(leaf)
        self._duplicates.pop(leaf, None)
        self.policy.displace(leaf.item)
        leaf.on_device = False
        self.free += leaf.num_slots
        if not leaf.item.is_adapter:
            self.forest.count_kv(leaf.adapter, device=-leaf.num_slots, host=0)
            self.counts["kv_slots_evicted"] += leaf.num_slots
        if leaf.parent is not None:
            leaf.parent.device_children -= 1
            self._update_leaf(leaf.parent)

    def _is_worth_copy(self, leaf: Segment) -> bool:
        """As ``EloraTreeCore._is_worth_host_copy``: also against what would have to go for it."""
        if not self.host_slots:
            return False
        if leaf.children:
            return True
        if not self.policy.worth_host_copy(leaf.item):
            return False
        policy, item = self.policy, leaf.item
        has_room = self.host_free >= leaf.num_slots
        lowest = None if has_room else self.host_leaves.lowest_rank()
        policy.price_host(lowest)
        rank = policy.host_rank(policy.host_kind(item), policy.priority(item))
        return lowest is None or rank > lowest

    def _to_host(self, leaf: Segment) -> bool:
        """Copy KV to the host, where the least goes for it. Whether there was room."""
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
        self.forest.count_kv(leaf.adapter, device=0, host=leaf.num_slots)
        self.counts["kv_slots_to_host"] += leaf.num_slots
        self.policy.displace(leaf.item)
        leaf.item.backed = True
        self.policy.place(leaf.item)
        self._duplicates[leaf] = None
        if leaf in self.leaves:
            self.leaves.lower(leaf)
        return True

    def _drop_duplicates(self, num_slots: int) -> None:
        """Host copies of what is on the device go first, those of the next to be evicted last: as
        SGLang's ``_reclaim_full_host_duplicates``."""
        for spares_leaves in (True, False):
            for segment in list(self._duplicates):
                if self.host_free >= num_slots:
                    return
                if not (spares_leaves and segment in self.leaves):
                    del self._duplicates[segment]
                    self.policy.displace(segment.item)
                    self._leave_host(segment)
                    self.policy.place(segment.item)

    def _leave_host(self, segment: Segment) -> None:
        self.host_leaves.discard(segment)
        segment.on_host = segment.item.backed = False
        self.host_free += segment.num_slots
        self.forest.count_kv(segment.adapter, device=0, host=-segment.num_slots)

    def _update_host_leaf(self, segment: Segment) -> None:
        if segment.on_host and not segment.on_device and not segment.children:
            self.host_leaves.add(segment)
            if self._lowers:
                self.host_leaves.lower(segment)

    def _drop(self, segment: Segment) -> None:
        """It is on no tier any more; what is below it on the host is out of reach."""
        for child in list(segment.children):
            self._leave_host(child)
            self._drop(child)
        self.policy.remove(segment.item)
        self.sessions.drop(segment)
        segment.num_sessions = 0
        segment.item = Item(False, segment.num_slots, segment.item.group)  # if it comes back
        if segment.parent is not None:
            segment.parent.children.pop(segment, None)
            self._update_host_leaf(segment.parent)

    def check_invariants(self, reserved: int) -> None:
        """Recompute sums and leaves from all segments, which hang under adapters.

        Args:
            reserved: Slots that running requests hold for themselves.

        Raises:
            AssertionError: One is not what it should be.
        """
        segments = self.segments()
        device = [segment for segment in segments if segment.on_device]
        locked = sum(s.num_slots for s in device if s.locks) + reserved
        assert self.free == self.pool_slots - reserved - sum(s.num_slots for s in device)
        assert self.free >= 0 and self.host_free >= 0
        assert self.locked == locked, (self.locked, locked)
        held = sum(s.num_slots for s in segments if s.on_host and not s.item.is_adapter)
        assert self.host_free == self.host_slots - held
        assert all(s.parent is None or s.parent.on_device for s in device), (
            "KV without what is above"
        )
        leaves = {s for s in device if not s.locks and not s.device_children}
        assert set(self.leaves) == leaves, (len(self.leaves), len(leaves))
        self.forest.check_invariants()
        self.policy.check_invariants([segment.item for segment in device])
        self.leaves.check_invariants()
