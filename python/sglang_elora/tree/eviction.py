"""Eviction rules that hold under every policy: which leaves one eviction may take, in which order,
and which of them are copied to the host first.

The order itself comes from a policy (``policy/``) and is kept in ``EvictionOrder`` heaps. The
server's tree and the simulator's share this file.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from sglang_elora.policy import CacheEntry, Policy, SessionState
from sglang_elora.tree.eviction_order import EvictionOrder

Reason = Literal["api", "capacity", "proactive", "unload"]
"""Why an entry is evicted: a call of the HTTP API; a request or load that needs its slots; the
planner, in advance of such a need; the unloading of its adapter."""

MAX_REMEMBERED = 8192
"""Most evicted entries that are remembered as candidates for a load back. More cost memory only."""

REFRESH_EVERY = 2**-11
"""Pool turnovers between two refreshes of the order on the device. Ranks of 200 kinds are then at
most 1.3% of a turnover old. Raising it makes fewer of the scheduler's steps longer, by 0.1 ms, and
ranks older."""

_QUEUED = "queued"
"""Kind of all entries that queued requests need. It ranks above every other kind."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """The limits of one eviction, and its reason.

    Attributes:
        num_slots: Slots to free.
        protect_up_to: Queue position. Entries that a request at this or an earlier position needs
            are not evicted. -1 protects none; entries that queued requests need are evicted last.
        max_leaves: Most leaves to evict. Each costs the scheduler tens of microseconds.
        reason: Label of the counters.
        takes_adapters: False: stop when the next victim is an adapter.
    """

    num_slots: int = sys.maxsize
    protect_up_to: int = -1
    max_leaves: int = sys.maxsize
    reason: Reason = "capacity"
    takes_adapters: bool = True

    def freeing(self, num_slots: int, max_leaves: int | None = None) -> Eviction:
        """A copy with other numbers of slots and leaves."""
        max_leaves = self.max_leaves if max_leaves is None else max_leaves
        return replace(self, num_slots=num_slots, max_leaves=max_leaves)


class Node(Protocol):
    """A node of the cache tree."""

    entry: CacheEntry


N = TypeVar("N", bound=Node)


class Victims(Generic[N]):
    """Iterates over the leaves that one eviction takes.

    Leaves that no queued request needs come first, lowest rank first; then leaves that queued
    requests need, the request at the end of the queue first.

    Args:
        order: The evictable leaves. Leaves that are examined are taken out of it until ``close``.
        eviction: The limits.
    """

    def __init__(self, order: EvictionOrder[N], eviction: Eviction) -> None:
        self.eviction = eviction
        self.num_left = eviction.max_leaves  # leaves that it may still take
        self._order = order
        self._queued: list[tuple[int, int, N]] = []  # leaves that queued requests need

    @property
    def num_taken(self) -> int:
        """Number of leaves that the eviction has taken."""
        return self.eviction.max_leaves - self.num_left

    def next(self) -> N | None:
        """The next leaf; None if there is none, or no more may be taken."""
        if self.num_left <= 0:
            return None
        take_lowest = self._order.take_lowest
        while (leaf := take_lowest()) is not None:
            entry = leaf.entry
            if entry.queue_position is None:
                if entry.is_adapter and not self.eviction.takes_adapters:
                    return None
                self.num_left -= 1
                return leaf
            heapq.heappush(self._queued, (-entry.queue_position, len(self._queued), leaf))
        while self._queued and -self._queued[0][0] > self.eviction.protect_up_to:
            leaf = heapq.heappop(self._queued)[2]
            if leaf in self._order:  # otherwise it was evicted meanwhile
                self.num_left -= 1
                return leaf
        return None

    def put_back(self) -> None:
        """Do not count the last leaf: it was not evicted after all."""
        self.num_left += 1

    def close(self) -> None:
        """End the eviction: leaves that were examined but not evicted return to the order."""
        self._order.give_back()


class TierOrders(Generic[N]):
    """The leaves of a tree in eviction order, one order per tier (device and host).

    Args:
        policy: Ranks entries.
        is_on_host: Whether a node has a copy in host memory.
    """

    def __init__(self, policy: Policy, is_on_host: Callable[[N], bool]) -> None:
        self._policy = policy
        self._refreshed_at = policy.clock
        # These run thousands of times per second: bound once, without attributes of ``self``.
        kind_of, rank_of, priority_of = policy.kind, policy.rank, policy.priority
        host_kind_of, host_priority_of = policy.host_kind, policy.host_priority

        def kind(node: N) -> Hashable:
            entry = node.entry
            if entry.queue_position is not None:
                return _QUEUED
            entry.backed = is_on_host(node)
            return kind_of(entry)

        def rank(kind: Any, lowest: Any) -> float:
            return math.inf if kind is _QUEUED else rank_of(kind, lowest)

        def priority(node: N) -> float:
            return priority_of(node.entry)

        self.device: EvictionOrder[N] = EvictionOrder(priority, kind, rank)
        self.host: EvictionOrder[N] = EvictionOrder(
            lambda node: host_priority_of(node.entry),
            lambda node: host_kind_of(node.entry),
            policy.host_rank,
        )

    def refresh(self) -> None:
        """Refresh the order on the device, because ranks change with time. Call once per scheduler
        iteration, when there is time."""
        clock = self._policy.clock
        if clock - self._refreshed_at >= REFRESH_EVERY:
            self._refreshed_at = clock
            self.device.refresh()

    def set_queue_position(self, node: N, position: int | None) -> None:
        """Set the position of the first queued request that needs the node; None: there is none."""
        node.entry.queue_position = position
        if position is None and node in self.device:
            self.device.lower(node)

    def set_session_state(self, node: N, state: SessionState) -> None:
        """Set the state of the sessions that use the node."""
        if node.entry.session_state == state:
            return
        self._policy.set_session_state(node.entry, state)
        for order in (self.device, self.host):
            if node in order:
                order.lower(node)

    def image_priority(self, adapter: CacheEntry) -> float:
        """Priority of an adapter's copy in host memory; the lowest is dropped first. Infinity while
        a queued request needs the adapter."""
        return math.inf if adapter.queue_position is not None else self._policy.priority(adapter)

    def is_worth_host_copy(
        self, node: N, *, has_children: bool, has_room: Callable[[], bool]
    ) -> bool:
        """Whether evicted KV is copied to the host, rather than dropped.

        The copy must be worth its transfer and, where host memory is full, more than the entry
        that is dropped for it.

        Args:
            has_children: Nodes below it have KV on the host, which would be lost without it; it is
                always copied then.
            has_room: Whether host memory has room for it without dropping an entry.
        """
        policy, item = self._policy, node.entry
        if has_children:
            return True
        if not policy.worth_host_copy(item):
            return False
        lowest = None if has_room() else self.host.lowest_rank()
        policy.price_host(lowest)
        rank = policy.host_rank(policy.host_kind(item), policy.host_priority(item))
        return lowest is None or bool(rank > lowest)

    def next_victims(self, most_leaves: int, is_wanted: Callable[[N], bool]) -> list[N]:
        """Those of the next ``most_leaves`` victims that satisfy ``is_wanted``. Evicts nothing.

        The search ends at a leaf that a queued request needs.
        """
        found = []
        for _ in range(most_leaves):
            leaf = self.device.take_lowest()
            if leaf is None or leaf.entry.queue_position is not None:
                break
            if is_wanted(leaf):
                found.append(leaf)
        self.device.give_back()
        return found
