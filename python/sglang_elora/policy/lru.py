"""Least recently used: SGLang's own order."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_elora.policy.cache_entry import CacheEntry
from sglang_elora.policy.policy import Costs, Policy
from sglang_elora.policy.registry import register

_STEP = 2.0**-20


@register
class LRU(Policy):
    """Order by last visit. On a path the deepest entry counts as the most recent, as in SGLang."""

    name = "lru"

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs)
        self._num_visits = 0

    def visit(self, path: Iterable[CacheEntry]) -> None:
        self._num_visits += 1
        time = float(self._num_visits)
        for item in path:
            item.visits += 1
            item.last = time
            time -= _STEP

    def priority(self, item: CacheEntry) -> float:
        return item.last
