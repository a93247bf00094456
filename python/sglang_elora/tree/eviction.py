"""Where eviction is decided: what one eviction may take, in which order, and what is copied first.

The order itself is a policy's (``policy/``), kept up to date by ``EvictionOrder`` heaps. This file
adds the rules that hold under every policy. The server's tree and the simulator's share it.
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
"""Why something is evicted: an order over HTTP, a request or a load that needs its slots, the
planner before anything needs them, the end of its adapter."""

MAX_REMEMBERED = 8192
"""Evictions that are remembered, the last of which may be loaded back."""

_QUEUED = "queued"
"""Kind of all entries that queued requests need. It ranks above every other kind."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """What one eviction may take, and why.

    Attributes:
        num_slots: Slots to free.
        protect_up_to: Queue position. What a request at this position or an earlier one needs is
            not evicted. -1 protects nothing; what queued requests need is then evicted last.
        max_leaves: Most leaves that it takes. Each costs the scheduler tens of microseconds.
        reason: Label of the counters.
        takes_adapters: False: it ends where an adapter would be next.
    """

    num_slots: int = sys.maxsize
    protect_up_to: int = -1
    max_leaves: int = sys.maxsize
    reason: Reason = "capacity"
    takes_adapters: bool = True

    def freeing(self, num_slots: int, max_leaves: int | None = None) -> Eviction:
        """The same for another number of slots, and of leaves."""
        max_leaves = self.max_leaves if max_leaves is None else max_leaves
        return replace(self, num_slots=num_slots, max_leaves=max_leaves)


class Node(Protocol):
    """Of the tree."""

    entry: CacheEntry


N = TypeVar("N", bound=Node)


class Victims(Generic[N]):
    """The leaves that one eviction takes, one after the other.

    Leaves that no queued request needs come first, lowest rank first; then leaves that queued
    requests need, the request at the end of the queue first.

    Args:
        order: Of the leaves. Those that are looked at are taken out of it until ``close``.
        eviction: What it may take.
    """

    def __init__(self, order: EvictionOrder[N], eviction: Eviction) -> None:
        self.eviction = eviction
        self.num_left = eviction.max_leaves  # leaves that it may still take
        self._order = order
        self._queued: list[tuple[int, int, N]] = []  # leaves that queued requests need

    @property
    def num_taken(self) -> int:
        """Leaves that it has taken."""
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
            if leaf in self._order:  # what was evicted meanwhile is no leaf any more
                self.num_left -= 1
                return leaf
        return None

    def put_back(self) -> None:
        """The last leaf was not evicted after all, and does not count."""
        self.num_left += 1

    def close(self) -> None:
        """The eviction is over: leaves that were looked at and stay return to the order."""
        self._order.give_back()


class TierOrders(Generic[N]):
    """The leaves of a tree over two tiers, in the order of a policy.

    Args:
        policy: Ranks entries.
        is_on_host: Whether a node has a copy in host memory.
    """

    def __init__(self, policy: Policy, is_on_host: Callable[[N], bool]) -> None:
        self._policy = policy
        # These run thousands of times per second: bound once, without attributes of ``self``.
        kind_of, rank_of, priority_of = policy.kind, policy.rank, policy.priority
        host_kind_of = policy.host_kind

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
            priority, lambda node: host_kind_of(node.entry), policy.host_rank
        )

    def set_queue_position(self, node: N, position: int | None) -> None:
        """The first queued request that needs the node is at this position; None: none is."""
        node.entry.queue_position = position
        if position is None and node in self.device:
            self.device.lower(node)

    def set_session_state(self, node: N, state: SessionState) -> None:
        """The sessions that use the node are alive, or over."""
        if node.entry.session_state == state:
            return
        self._policy.set_session_state(node.entry, state)
        for order in (self.device, self.host):
            if node in order:
                order.lower(node)

    def image_priority(self, adapter: CacheEntry) -> float:
        """What an adapter's copy in host memory is worth: infinity while a queued request needs it.
        The one of lowest priority is dropped first."""
        return math.inf if adapter.queue_position is not None else self._policy.priority(adapter)

    def is_worth_host_copy(
        self, node: N, *, has_children: bool, has_room: Callable[[], bool]
    ) -> bool:
        """Whether KV that leaves the device is copied to the host, rather than dropped.

        The copy must be worth its transfer and, where host memory is full, more than the entry
        that is dropped for it.

        Args:
            has_children: Nodes below it have KV on the host, which is lost without it: it is
                always copied.
            has_room: Whether host memory has room for it as it is.
        """
        policy, item = self._policy, node.entry
        if has_children:
            return True
        if not policy.worth_host_copy(item):
            return False
        lowest = None if has_room() else self.host.lowest_rank()
        policy.price_host(lowest)
        rank = policy.host_rank(policy.host_kind(item), policy.priority(item))
        return lowest is None or bool(rank > lowest)

    def next_victims(self, most_leaves: int, is_wanted: Callable[[N], bool]) -> list[N]:
        """Of the next leaves in order, those that ``is_wanted`` says. Nothing is evicted.

        It ends at a leaf that a queued request needs.
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
