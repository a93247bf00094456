"""Loading of adapters in a simulated server: concurrently with batches, or before each batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence

from sglang_elora.estimators import OnlineCosts
from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.link import Link
from sglang_elora.sim.memory import PoolMemory
from sglang_elora.sim.request import Request, Talk
from sglang_elora.sim.segment import Segment
from sglang_elora.swapper.planner import Planner

PREPARES_PER_STEP = 4
"""Largest number of planner steps simulated for one run of decode steps. Raising it prefetches more
and takes longer to simulate."""


MOST_LOADED_FOR = 128
"""Waiting requests that a static split with overlapped loads looks at per step."""


class Residence(ABC):
    """Decides when requests have their adapters on the device."""

    num_loads = 0
    next_s = math.inf
    """The time at which the next copy or read ends that a waiting request may need."""

    def step(self, now_s: float, waiting: Sequence[Request], *, is_busy: bool) -> None:
        """Start the loads that waiting requests need; called before a batch is chosen."""
        return

    def expect(self, talk: Talk) -> None:
        """Receive the client's hint that the next turn of this session will follow."""
        return

    def order(self, adapter_ids: Sequence[str], *, to_device: bool) -> None:
        """Receive an order to load adapters to the device, or into host memory only."""
        return

    def read_ahead(self, now_s: float) -> None:
        """Read files in advance; called when there is no request, and when a read ends then."""
        return

    def prepare(self, now_s: float, num_steps: int) -> None:
        """Prefetch and evict in advance, while a batch or ``num_steps`` decode steps run."""
        return

    @abstractmethod
    def is_there(self, adapter: Segment) -> bool: ...

    @abstractmethod
    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        """Whether the state of the request's adapter allows admitting it now."""

    @abstractmethod
    def enter(self, request: Request) -> None:
        """Hold the adapter of a request that joins the batch."""

    def used(self, request: Request) -> None:
        """Called when the request's prefix has been matched and its slots reserved."""
        return

    @abstractmethod
    def ready_s(self, now_s: float, batch: Sequence[Request]) -> float:
        """The time at which all adapters of a batch that starts now are loaded; a lower bound of
        the batch's end."""

    def blocked_s(self, now_s: float, batch: Sequence[Request]) -> float:
        """The time at which the computation of a batch can begin."""
        return now_s

    @abstractmethod
    def leave(self, request: Request) -> None:
        """Release the adapter of a request that has ended."""


class SplitResidence(Residence):
    """SGLang's static split: a fixed number of adapter slots with LRU eviction; loads block the
    batch. As in SGLang, requests of the base model occupy a slot, too."""

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


class OverlapResidence(SplitResidence):
    """A static split whose loads start for waiting requests and run concurrently with batches, as
    with SGLang's ``--enable-lora-overlap-loading``: a request enters a batch once its adapter is
    loaded."""

    def __init__(self, num_slots: int, calibration: Calibration, link: Link) -> None:
        super().__init__(num_slots, calibration, link)
        self._loaded_s: dict[Segment, float] = {}  # loads in progress -> when each ends

    @property
    def next_s(self) -> float:  # type: ignore[override]
        return min(self._loaded_s.values(), default=math.inf)

    def step(self, now_s: float, waiting: Sequence[Request], *, is_busy: bool) -> None:
        for adapter in [a for a, end_s in self._loaded_s.items() if end_s <= now_s]:
            del self._loaded_s[adapter]
        needed: set[Segment] = set()
        for request in waiting[:MOST_LOADED_FOR]:
            needed.add(request.talk.adapter)
            if len(needed) > self._num_slots:
                break
            if request.talk.adapter not in self._slots and self._make_room(needed):
                self._load(now_s, request.talk.adapter)

    def is_there(self, adapter: Segment) -> bool:
        return adapter in self._slots and adapter not in self._loaded_s

    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        return self.is_there(request.talk.adapter)

    def blocked_s(self, now_s: float, batch: Sequence[Request]) -> float:
        for request in batch:
            self._slots.move_to_end(request.talk.adapter)
        return now_s

    def _make_room(self, needed: set[Segment]) -> bool:
        if len(self._slots) < self._num_slots:
            return True
        kept = (self._used, self._loaded_s, needed)
        victims = (a for a in self._slots if not any(a in group for group in kept))
        victim = next(victims, None)
        if victim is not None:
            del self._slots[victim]
        return victim is not None

    def _load(self, now_s: float, adapter: Segment) -> None:
        copies = self._calibration.copies_per_adapter_split
        self._loaded_s[adapter] = self._link.copy(now_s, adapter.num_slots, copies)
        self._slots[adapter] = None
        self.num_loads += 1


class PoolResidence(Residence):
    """ELORA's adapters in the pool, copied concurrently with batches by the server's planner."""

    def __init__(
        self, cache: Cache, calibration: Calibration, link: Link, costs: OnlineCosts
    ) -> None:
        self._memory = PoolMemory(cache, calibration, link, costs)
        self._planner = Planner(self._memory, costs)

    @property
    def num_loads(self) -> int:  # type: ignore[override]
        return self._memory.num_loads

    @property
    def next_s(self) -> float:  # type: ignore[override]
        """The time at which a copy or read ends, or now if the last step's work was limited."""
        return self._memory.now_s if self._planner.is_limited else self._memory.next_s

    def step(self, now_s: float, waiting: Sequence[Request], *, is_busy: bool) -> None:
        self._memory.settle(now_s)
        self._planner.begin_step(is_busy=is_busy)
        self._planner.load(waiting)
        self._planner.load_session()
        self._planner.read_ahead(waiting, is_busy=is_busy)

    def read_ahead(self, now_s: float) -> None:
        self._memory.settle(now_s)
        self._planner.begin_step(is_busy=False)
        self._planner.read_ahead((), is_busy=False)

    def prepare(self, now_s: float, num_steps: int) -> None:
        self._memory.now_s = max(self._memory.now_s, now_s)
        self._memory.num_launches += num_steps
        self._memory.refresh_order()
        for _ in range(min(num_steps, PREPARES_PER_STEP)):
            if not self._planner.prepare():
                break

    def expect(self, talk: Talk) -> None:
        if not talk.adapter.is_base:
            self._planner.expect([str(talk.adapter.entry.group)])
        self._planner.expect_sessions([talk.name])

    def order(self, adapter_ids: Sequence[str], *, to_device: bool) -> None:
        if to_device:
            self._planner.expect(adapter_ids, ordered=True)
        else:
            self._planner.read_first(adapter_ids)

    def is_there(self, adapter: Segment) -> bool:
        return self._memory.is_there(adapter)

    def may_enter(self, request: Request, batch: Sequence[Request], is_idle: bool) -> bool:
        adapter_id = request.lora_id
        if not request.talk.adapter.on_device:
            return False
        if adapter_id is None or adapter_id not in self._memory.copies:
            return True
        return self._planner.is_hidden(
            adapter_id,
            request.num_prompt,
            is_idle=is_idle and not batch,
            waits_whole=False,
        )

    def enter(self, request: Request) -> None:
        self._memory.cache.lock(request.talk.adapter)

    def used(self, request: Request) -> None:
        if request.lora_id is not None:
            self._planner.used(request.lora_id)

    def ready_s(self, now_s: float, batch: Sequence[Request]) -> float:
        adapters = (request.lora_id for request in batch)
        ends = (self._memory.copied_s(a, now_s) for a in adapters if a is not None)
        return max(ends, default=now_s)

    def leave(self, request: Request) -> None:
        self._memory.cache.unlock(request.talk.adapter)
