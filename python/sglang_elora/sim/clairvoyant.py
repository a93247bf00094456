"""A policy that knows the trace's future uses, as a yardstick for real policies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self, runtime_checkable

from typing_extensions import override

from sglang_elora.policy import CacheEntry, Costs, Policy, PolicyContext, register

SOON_S = 1e-3
"""Seconds until the next use below which entries are not told apart."""


@runtime_checkable
class Foreseer(Protocol):
    """A policy that is told when each entry is used next."""

    now_s: float

    def foresee(self, item: CacheEntry, next_s: float) -> None:
        """Set the time of the entry's next use, infinity for never. The entry must be locked, or
        not on the device."""
        ...


@register
class Clairvoyant(Policy):
    """Policy with the rank ``seconds saved per slot / seconds until the next use``; entries that
    are never used again are evicted first.

    Entries of one kind save the same time, so among them the one with the latest next use is
    evicted, as in Belady's algorithm; kinds are compared by the quotient. An adapter's next use is
    no later than its KV's, so the order respects that dependency. With different sizes, two tiers
    and queues this is a yardstick, not a proven bound.

    Next uses are taken from the trace's own times. After a use the next one is later, so a priority
    falls: the cache reorders unlocked entries by ``lower``.
    """

    name = "clairvoyant"

    def __init__(self, costs: Costs, writes_back: bool = False) -> None:
        super().__init__(costs)
        self.now_s = 0.0
        self._writes_back = writes_back

    @classmethod
    @override
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        return cls(context.costs, context.writes_back, **options)

    def foresee(self, item: CacheEntry, next_s: float) -> None:
        item.score = -next_s

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            item.visits += 1

    def kind(self, item: CacheEntry) -> tuple[bool, bool]:
        return item.is_adapter, item.backed

    def priority(self, item: CacheEntry) -> float:
        return item.score

    def rank(self, kind: tuple[bool, bool], priority: float) -> float:
        is_adapter, is_backed = kind
        costs = self.costs
        if is_adapter:
            saved = costs.load
        elif is_backed:
            saved = min(costs.recompute, costs.load)
        elif self._writes_back:
            saved = min(costs.recompute, 2 * costs.load)
        else:
            saved = costs.recompute
        return saved / max(-priority - self.now_s, SOON_S)

    def worth_host_copy(self, item: CacheEntry) -> bool:
        return item.score > float("-inf")
