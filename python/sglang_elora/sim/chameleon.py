"""Chameleon's eviction order for adapters, on a server that caches no KV of ended requests."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_elora.policy import NEVER, CacheEntry, Costs, Policy, register

FREQUENCY, RECENCY, SIZE = 0.45, 0.10, 0.45
_WINDOW = 16.0  # half-life of counted uses, in pool turnovers


@register
class Chameleon(Policy):
    """Policy with the score ``0.45 frequency + 0.10 recency + 0.45 size``, each normalised by its
    maximum; the adapter with the lowest score is evicted.

    Source: Iliakopoulou et al., "Chameleon: Adaptive Caching and Scheduling for Many-Adapter LLM
    Inference Environments", MICRO 2025. The weights were recalled without access to the paper's
    text; the normalisation and the period over which uses are counted are our assumptions.
    Not modelled are its scheduler and the sizing of its cache by predicted load: adapters use all
    slots that running requests leave.
    """

    name = "chameleon"

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs)
        self._most_uses, self._largest = 1.0, 1

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            item.score = self._uses(item) + 1
            item.visits += 1
            item.last = self.clock
            self._most_uses = max(self._most_uses, item.score)
            self._largest = max(self._largest, item.num_slots)

    def kind(self, item: CacheEntry) -> CacheEntry:
        """One kind per adapter, since the scores change at different rates over time."""
        return item

    def priority(self, item: CacheEntry) -> float:
        return item.last

    def rank(self, kind: CacheEntry, priority: float) -> float:
        if kind.last == NEVER:
            return 0.0
        recency = 1 / (1 + self.clock - kind.last)
        frequency, size = self._uses(kind) / self._most_uses, kind.num_slots / self._largest
        return FREQUENCY * frequency + RECENCY * recency + SIZE * size

    def _uses(self, item: CacheEntry) -> float:
        if item.last == NEVER:
            return 0.0
        return float(item.score * 0.5 ** ((self.clock - item.last) / _WINDOW))
