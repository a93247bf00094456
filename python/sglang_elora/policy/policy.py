"""The contract of an eviction policy: in which order cache entries become victims.

A policy is pure. It maps numbers to an order and uses no tree, page, wall clock or socket. All
tensor-parallel ranks call it with the same values and so get the same order.

Time is counted in turnovers of the pool: one turnover has passed when as many slots have been
filled as the pool has. Time stops while nothing is written, and does not depend on the pool's size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sglang_elora.policy.cache_entry import CacheEntry, SessionState


@dataclass(slots=True)
class Costs:
    """Measured rates, in seconds per slot unless noted. Set by their owner.

    The defaults are for an 8B model on an H200: 25,000 tokens per second of prefill, and 128 KiB of
    KV per token over a PCIe 5 link of 55 GB/s.
    """

    recompute: float = 40e-6
    load: float = 2.4e-6
    load_latency: float = 10e-6  # per copy
    batch: float = 1e-3  # per prefill batch, in addition to its tokens

    def load_of(self, item: CacheEntry) -> float:
        """Seconds per slot to load an entry from the host."""
        return self.load + self.load_latency / max(item.num_slots, 1)


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """The properties of the cache that a policy may read.

    Attributes:
        costs: Measured rates, kept up to date by their owner.
        needed_adapters: Adapters that a batch is expected to use.
        resident_adapters: Adapters on the device.
        is_held: Whether an adapter cannot or should not be evicted: a running or queued request
            needs it.
        writes_back: Whether evicted KV is copied to the host if that is worth the transfer.
    """

    costs: Costs
    needed_adapters: Callable[[], float] = lambda: 1.0
    resident_adapters: Callable[[], int] = lambda: 0
    is_held: Callable[[str], bool] = lambda adapter_id: False
    writes_back: bool = False


class Policy(ABC):
    """The order in which cache entries are evicted.

    Entries of one ``kind`` are ordered by ``priority``, lowest first. A priority never falls unless
    the entry changes kind. The lowest entries of all kinds are compared by ``rank``, which may
    change at any time. So the owner finds the victim in O(kinds + log entries).

    Args:
        costs: Measured rates; their owner keeps them up to date.
    """

    name: ClassVar[str]
    ghost_turnovers: ClassVar[float] = 0.0
    """Pool turnovers for which KV that left device and host is remembered (``tree/ghosts.py``)."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.clock = 0.0

    @classmethod
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        """Build the policy for a cache; ``options`` are arguments specific to the policy."""
        return cls(context.costs, **options)

    def advance(self, turnovers: float) -> None:
        """Advance the clock: slots were filled, as a share of the pool's slots."""
        self.clock += turnovers

    def create(self, item: CacheEntry) -> None:
        """Add an entry to the cache; the request that created it is its first visit."""
        self.visit((item,))

    @abstractmethod
    def visit(self, path: Iterable[CacheEntry]) -> None:
        """Record that a request uses these entries, the deepest first."""

    def set_session_state(self, item: CacheEntry, session_state: SessionState) -> None:
        """Set the state of the sessions that use the entry."""
        item.session_state = session_state

    def split(self, item: CacheEntry, num_slots: int) -> CacheEntry:
        """Split off the first ``num_slots`` of a run of KV as a new entry; returns it."""
        return item.split(num_slots)

    def remove(self, item: CacheEntry) -> None:
        """Record that an entry left both device and host, and is no longer observed."""
        return

    def place(self, item: CacheEntry) -> None:
        """Record that the entry is on the device from now on."""
        return

    def displace(self, item: CacheEntry) -> None:
        """Record that the entry is no longer on the device."""
        return

    def evict(self, item: CacheEntry) -> None:
        """Record that the entry was chosen as a victim by this order and leaves the device."""
        return

    def kind(self, item: CacheEntry) -> Hashable:
        """The class of entries within which ``priority`` alone decides."""
        return None

    @abstractmethod
    def priority(self, item: CacheEntry) -> float:
        """Position among entries of the same kind; the lowest is evicted first."""

    def rank(self, kind: Any, priority: float) -> float:
        """Value by which an entry is compared with those of other kinds; lowest first."""
        return priority

    def host_kind(self, item: CacheEntry) -> Hashable:
        """As ``kind``, for a copy on the host."""
        return None

    def host_priority(self, item: CacheEntry) -> float:
        """As ``priority``, for a copy on the host."""
        return self.priority(item)

    def host_rank(self, kind: Any, priority: float) -> float:
        """As ``rank``, for copies on the host."""
        return priority

    def price_host(self, rank: Any) -> None:
        """Record the price of a host slot; called when KV may be copied to the host.

        Args:
            rank: ``host_rank`` of the copy that is dropped for it; None if the host has room.
        """
        return

    def learn(self) -> bool:
        """Do work that takes too long for ``visit`` or ``evict``; called when there is time.

        Returns:
            Whether there was any.
        """
        return False

    def check_invariants(self, on_device: Iterable[CacheEntry]) -> None:
        """Check the policy's counters against the entries on the device."""
        return

    def worth_host_copy(self, item: CacheEntry) -> bool:
        """Whether evicted KV should be copied to the host rather than dropped."""
        return True
