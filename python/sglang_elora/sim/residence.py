"""How a simulated server's adapters come to the device: beside the batches, or in front of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from itertools import islice

from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.link import Link
from sglang_elora.sim.measure import Measure
from sglang_elora.sim.request import Request
from sglang_elora.sim.segment import Segment

# As in srt/scheduler/swapper.py and srt/mem_cache/residency.py.
LOOKAHEAD = 64
MAX_SLOTS_UNDER_WAY_SHARE = 0.25
PREFETCH_BELOW = 0.7
PREFETCH_LOOKS = 8
ROOM_LEAVES = 3
COPY_AHEAD_BELOW = 0.1
COPY_AHEAD_LEAVES = 4
EXPECTED_WITHIN = 1.0
_LAST_LOADS = 8


class Residence(ABC):
    """Who has its adapter, and when."""

    num_loads = 0
    next_s = math.inf
    """When something is over that nobody runs for."""

    def step(self, now_s: float, waiting: Sequence[Request]) -> None:
        """Before a batch is chosen: start what waiting requests need."""
        return

    def prepare(self, now_s: float, num_steps: int) -> None:
        """While a batch, or so many decode steps, run: what makes later steps shorter."""
        return

    @abstractmethod
    def is_there(self, adapter: Segment) -> bool: ...

    @abstractmethod
    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        """Whether the request's adapter lets it run now."""

    @abstractmethod
    def enter(self, request: Request) -> None:
        """It is in the batch, and its adapter stays."""

    @abstractmethod
    def ready_s(self, now_s: float, batch: Sequence[Request]) -> float:
        """When the adapters of a batch that starts now are all there; the batch ends no sooner."""

    def blocked_s(self, now_s: float, batch: Sequence[Request]) -> float:
        """When the computation of a batch can begin."""
        return now_s

    @abstractmethod
    def leave(self, request: Request) -> None:
        """It has ended."""


class SplitResidence(Residence):
    """SGLang's own: so many slots, least recently used first, loaded in front of the batch."""

    def __init__(self, num_slots: int, calibration: Calibration, link: Link) -> None:
        self.num_loads = 0
        self._num_slots = num_slots
        self._calibration, self._link = calibration, link
        self._slots: OrderedDict[Segment, None] = OrderedDict()
        self._used: Counter[Segment] = Counter()

    def is_there(self, adapter: Segment) -> bool:
        return adapter in self._slots

    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        return request.talk.adapter in self._used or len(self._used) < self._num_slots

    def enter(self, request: Request) -> None:
        self._used[request.talk.adapter] += 1

    def ready_s(self, now_s: float, batch: Sequence[Request]) -> float:
        return now_s

    def blocked_s(self, now_s: float, batch: Sequence[Request]) -> float:
        end_s = now_s
        for request in batch:
            adapter = request.talk.adapter
            if adapter not in self._slots:
                if len(self._slots) >= self._num_slots:
                    del self._slots[next(a for a in self._slots if a not in self._used)]
                copies = self._calibration.copies_per_adapter_split
                end_s = self._link.copy(now_s, adapter.num_slots, copies)
                self._slots[adapter] = None
                self.num_loads += 1
            self._slots.move_to_end(adapter)
        return end_s

    def leave(self, request: Request) -> None:
        adapter = request.talk.adapter
        self._used[adapter] -= 1
        if not self._used[adapter]:
            del self._used[adapter]


class PoolResidence(Residence):
    """ELORA's: pages of the pool, copies beside the batches (``srt/scheduler/swapper.py``)."""

    def __init__(
        self, cache: Cache, calibration: Calibration, link: Link, measure: Measure
    ) -> None:
        self.num_loads = 0
        self._cache, self._calibration, self._link = cache, calibration, link
        self._measure = measure
        self._copies: dict[Segment, float] = {}  # when they are over
        self._wanted: dict[Segment, int] = {}
        self._last_loads: deque[int] = deque(maxlen=_LAST_LOADS)
        self._placed_at = -math.inf
        self._to_host_free_s = 0.0
        self._all_copied_at = -1.0

    def step(self, now_s: float, waiting: Sequence[Request]) -> None:
        self._settle(now_s)
        if waiting or self._wanted:
            self._bring_wanted(now_s, waiting)
        elif self._cache.evicted and not self._copies:
            self._prefetch(now_s)

    def prepare(self, now_s: float, num_steps: int) -> None:
        cache = self._cache
        cache.leaves.refresh()
        for _ in range(min(num_steps, 4)):
            if not self._prepare_once(now_s):
                break

    def _prepare_once(self, now_s: float) -> bool:
        cache = self._cache
        if self._measure.take_over() or cache.policy.learn():
            return True
        is_expected = cache.policy.clock - self._placed_at <= EXPECTED_WITHIN
        room = max(self._last_loads, default=0)
        if is_expected and cache.free < room and cache.keep_room(room, ROOM_LEAVES):
            return True
        return self._copy_ahead(now_s)

    def is_there(self, adapter: Segment) -> bool:
        return adapter.on_device and adapter not in self._copies

    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        """As ``Swapper.is_hidden`` where the copy is under way."""
        adapter = request.talk.adapter
        if not adapter.on_device:
            return False
        if adapter not in self._copies or (is_idle and not batch):
            return True
        costs, slots = self._measure.costs, 0
        for other in self._copies:
            slots += other.num_slots
            if other is adapter:
                break
        copying_s = slots * costs.load + costs.load_latency
        return copying_s <= costs.batch + request.num_prompt * costs.recompute

    def enter(self, request: Request) -> None:
        self._cache.lock(request.talk.adapter)

    def ready_s(self, now_s: float, batch: Sequence[Request]) -> float:
        ends = (self._copies.get(request.talk.adapter, now_s) for request in batch)
        return max(ends, default=now_s)

    def leave(self, request: Request) -> None:
        self._cache.unlock(request.talk.adapter)

    def _settle(self, now_s: float) -> None:
        for adapter in [a for a, end_s in self._copies.items() if end_s <= now_s]:
            del self._copies[adapter]
            self._cache.unlock(adapter)
        self.next_s = min(self._copies.values(), default=math.inf)

    def _bring_wanted(self, now_s: float, waiting: Sequence[Request]) -> None:
        cache = self._cache
        wanted: dict[Segment, int] = {}
        missing: list[Segment] = []
        room = cache.free + cache.evictable
        for position, request in enumerate(islice(waiting, LOOKAHEAD)):
            adapter = request.talk.adapter
            room -= request.num_prompt
            if adapter not in wanted:
                if adapter.locks == 0:
                    room -= adapter.num_slots
                if room >= 0 or not wanted:
                    wanted[adapter] = position
                    cache.set_wanted(adapter, position)
                    if not adapter.on_device:
                        missing.append(adapter)
            if room < 0:
                break
        for adapter in self._wanted:
            if adapter not in wanted:
                cache.set_wanted(adapter, None)
        self._wanted = wanted
        for adapter in missing:
            if not (self._may_start(adapter) and self._place(now_s, adapter, wanted[adapter])):
                break

    def _may_start(self, adapter: Segment) -> bool:
        under_way = sum(copy.num_slots for copy in self._copies)
        most = MAX_SLOTS_UNDER_WAY_SHARE * self._cache.pool_slots
        return not under_way or under_way + adapter.num_slots <= most

    def _place(self, now_s: float, adapter: Segment, spared_since: int) -> bool:
        cache = self._cache
        if not cache.make_room(adapter.num_slots, spared_since):
            return False
        cache.place(adapter)
        cache.lock(adapter)
        begun_s = max(now_s, self._link.free_s)
        copies = self._calibration.copies_per_adapter
        end_s = self._link.copy(now_s, adapter.num_slots, copies)
        self._measure.copied(adapter.num_slots, end_s - begun_s)
        self._copies[adapter] = end_s
        self.next_s = min(self.next_s, end_s)
        self._last_loads.append(adapter.num_slots)
        self._placed_at = cache.policy.clock
        self.num_loads += 1
        return True

    def _prefetch(self, now_s: float) -> None:
        cache = self._cache
        room = cache.free - (1 - PREFETCH_BELOW) * cache.pool_slots
        if room <= 0 or self._link.free_s > now_s:
            return
        for _ in range(min(len(cache.evicted), PREFETCH_LOOKS)):
            segment = cache.evicted.pop()
            if segment.on_device or segment.num_slots > room:
                continue
            if segment.item.is_adapter:
                if self._place(now_s, segment, LOOKAHEAD):
                    return
                continue
            if not segment.on_host or (segment.parent and not segment.parent.on_device):
                continue
            cache.place(segment)
            self._link.copy(now_s, segment.num_slots, self._calibration.copies_per_kv_load)
            return

    def _copy_ahead(self, now_s: float) -> bool:
        cache = self._cache
        if not cache.host_slots or self._to_host_free_s > now_s:
            return False
        if cache.free > COPY_AHEAD_BELOW * cache.pool_slots:
            return False
        if cache.policy.clock == self._all_copied_at:
            return False
        num_slots = cache.copy_ahead(COPY_AHEAD_LEAVES)
        self._to_host_free_s = now_s + self._calibration.to_host_s(num_slots)
        if not num_slots:
            self._all_copied_at = cache.policy.clock
        return num_slots > 0
