"""What every policy answers: which node of the cache goes first when room is needed.

A policy is pure. It sees numbers and gives an order; it touches no tree, page, wall clock or
socket, so that all tensor-parallel ranks, which tell it the same things, come to the same order.

Time is counted in turnovers of the pool: one unit has passed when as many slots have been filled as
the pool has. It stands still while nothing is written, and means the same for a pool of a thousand
tokens and one of a million.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_elora.policy.cache_entry import CacheEntry, SessionState


@dataclass(slots=True)
class Costs:
    """Seconds, per slot where nothing else is said, as measured so far. Set by their owner.

    The values to start with are those of an 8B model on an H200: 25,000 tokens per second of
    prefill, and 128 KiB of KV per token over a PCIe 5 link of 55 GB/s.
    """

    recompute: float = 40e-6
    load: float = 2.4e-6
    load_latency: float = 10e-6  # per copy
    batch: float = 1e-3  # per batch of prefill, beside what its tokens take

    def load_of(self, item: CacheEntry) -> float:
        """Seconds per slot to bring an item back from the host."""
        return self.load + self.load_latency / max(item.num_slots, 1)


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may read of the cache that it orders.

    Attributes:
        costs: Measured rates, kept up to date by their owner.
        needed_adapters: Adapters that a batch is expected to use.
        resident_adapters: Adapters on the device.
        is_held: Whether an adapter cannot be evicted, or should not be, because a request uses it
            or waits for it.
        writes_back: Whether KV that is evicted is copied to the host if that is worth it.
    """

    costs: Costs
    needed_adapters: Callable[[], float] = lambda: 1.0
    resident_adapters: Callable[[], int] = lambda: 0
    is_held: Callable[[str], bool] = lambda adapter_id: False
    writes_back: bool = False


class Policy(ABC):
    """The order in which nodes are given up.

    Items of one ``kind`` are ordered by ``priority``, lowest first, and a priority never falls
    unless the item changes kind. The lowest of each kind are compared by ``rank``, which may change
    at any time. So the owner finds the lowest of all in O(kinds + log items).

    Args:
        costs: Read at every visit; the owner keeps it up to date.
    """

    name: ClassVar[str]

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.clock = 0.0

    @classmethod
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        """For a cache; ``options`` are arguments of the policy's own."""
        return cls(context.costs, **options)

    def advance(self, turnovers: float) -> None:
        """So much of the pool was filled anew."""
        self.clock += turnovers

    def create(self, item: CacheEntry) -> None:
        """An item enters the cache; the request that made it is its first visit."""
        self.visit((item,))

    @abstractmethod
    def visit(self, path: Iterable[CacheEntry]) -> None:
        """A request uses these items, the deepest first."""

    def set_session_state(self, item: CacheEntry, session_state: SessionState) -> None:
        """Those who use the item have said something else of themselves than before."""
        item.session_state = session_state

    def split(self, item: CacheEntry, num_slots: int) -> CacheEntry:
        """The first ``num_slots`` of a run of KV become an item of their own."""
        return item.split(num_slots)

    def remove(self, item: CacheEntry) -> None:
        """An item left the cache, device and host; it may come back as a new one."""
        return

    def place(self, item: CacheEntry) -> None:
        """The item is on the device from now on."""
        return

    def displace(self, item: CacheEntry) -> None:
        """The item is on the device no longer."""
        return

    def evict(self, item: CacheEntry) -> None:
        """An item leaves the device because it came first in this order."""
        return

    def kind(self, item: CacheEntry) -> Hashable:
        return None

    @abstractmethod
    def priority(self, item: CacheEntry) -> float:
        """Rank among items of its kind: what is lowest goes first."""

    def rank(self, kind: Any, priority: float) -> float:
        """Where an item of this kind and priority stands among items of other kinds."""
        return priority

    def host_kind(self, item: CacheEntry) -> Hashable:
        """``kind`` of a copy on the host."""
        return None

    def host_rank(self, kind: Any, priority: float) -> float:
        """``rank`` of copies on the host."""
        return priority

    def price_host(self, rank: Any) -> None:
        """KV is to be copied to the host: ``host_rank`` of what goes first there, if something has
        to go for it, else None."""
        return

    def learn(self) -> bool:
        """Called when there is time for work that would be too long for ``visit`` or ``evict``.

        Returns:
            Whether there was any.
        """
        return False

    def check_invariants(self, on_device: Iterable[CacheEntry]) -> None:
        """Recompute what the policy counts from the items on the device."""
        return

    def worth_host_copy(self, item: CacheEntry) -> bool:
        """Whether KV that leaves the device should be copied to the host, not dropped."""
        return True
