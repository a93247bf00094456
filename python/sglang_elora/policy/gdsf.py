"""Greedy-Dual-Size-Frequency: a strong baseline from web caching."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_elora.policy.cache_entry import CacheEntry
from sglang_elora.policy.policy import Costs, Policy
from sglang_elora.policy.registry import register


@register
class GDSF(Policy):
    """Order by ``L + visits * cost / size``, where L is the highest rank evicted so far.

    Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
    Policy", HP Labs HPL-98-69R1. Cost is the seconds to load or recompute an entry, size its slots.
    """

    name = "gdsf"

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs)
        self._inflation = 0.0

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            item.visits += 1
            rank = self._inflation + item.visits * self._seconds_per_slot(item)
            item.score = max(item.score, rank)  # a new host copy lowers ``rank``; scores never fall

    def evict(self, item: CacheEntry) -> None:
        self._inflation = max(self._inflation, item.score)

    def priority(self, item: CacheEntry) -> float:
        return item.score

    def _seconds_per_slot(self, item: CacheEntry) -> float:
        load = self.costs.load_of(item)
        if item.is_adapter:
            return load
        recompute = self.costs.recompute
        return min(recompute, load) if item.backed else recompute
