"""The policy that knows the future: what is used again last, per slot and second saved, goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from typing_extensions import override

from sglang_elora.policy import CacheEntry, Costs, Policy, PolicyContext, register

_SOON_S = 1e-3


@register
class Clairvoyant(Policy):
    """``seconds saved per slot / seconds until the next use``; what is never used again goes first.

    Items of one kind save alike, so the one that is used last goes, as with Belady; kinds are
    compared by the quotient. An adapter is used no later than its KV, so the order keeps to the
    dependency by itself. With sizes, two tiers and queues it is a yardstick and no proven bound.

    The next use is the one of the trace's own times. It becomes later when it has been, so that a
    priority falls: the cache lowers what is unlocked.
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
        """When the item is used next, infinity for never. It is locked, or not on the device."""
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
        return saved / max(-priority - self.now_s, _SOON_S)

    def worth_host_copy(self, item: CacheEntry) -> bool:
        return item.score > float("-inf")
