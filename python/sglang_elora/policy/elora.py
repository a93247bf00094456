"""ELORA's default: seconds saved per slot, by what is expected and what is measured.

``value = expected visits * seconds saved per visit / slots``. Seconds saved are the time to bring
an adapter, or KV with a copy on the host, over the link, and the time to compute other KV anew, at
the rates measured so far. Expected visits are decayed visits times the learned gain of the kind
(``reuse.py``).

Against the paper's model: value is per byte, so that a large item has to earn its place; rates are
measured; kinds whose items do not come back, as a translated sentence's KV, learn to yield to those
that do; and the order of two items changes only when one is visited, so that nothing is rescanned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from sglang_elora.policy.item import NEVER, Item
from sglang_elora.policy.policy import Costs, Policy
from sglang_elora.policy.reuse import Reuse

ADAPTER, KV_ONCE, KV_AGAIN = range(3)
"""KV that one request has used (the end of a conversation), and KV that several have."""

_BACKED = 3  # added to a kind of KV with a copy on the host
HALF_LIFE = 2.0
"""Turnovers in which a visit loses half of its weight."""


class Elora(Policy):
    name = "elora"

    def __init__(self, costs: Costs, half_life: float = HALF_LIFE) -> None:
        super().__init__(costs)
        self.reuse = Reuse(3, half_life)

    def advance(self, turnovers: float) -> None:
        super().advance(turnovers)
        self.reuse.advance(turnovers)

    def visit(self, path: Iterable[Item]) -> None:
        reuse, clock = self.reuse, self.clock
        for item in path:
            if item.score != NEVER:
                kind = _family(item)
                reuse.leave(kind, reuse.weight(item.score, clock))
                reuse.see(kind)
            item.visits += 1
            item.last = clock
            item.score = reuse.add_visit(item.score, clock)
            item.weight = self._weight_in_kind(item)
            reuse.enter(_family(item), reuse.weight(item.score, clock))

    def split(self, item: Item, num_slots: int) -> Item:
        first = super().split(item, num_slots)
        if first.score != NEVER:
            self.reuse.enter(_family(first), self.reuse.weight(first.score, self.clock))
        return first

    def remove(self, item: Item) -> None:
        if item.score != NEVER:
            self.reuse.leave(_family(item), self.reuse.weight(item.score, self.clock))

    def kind(self, item: Item) -> int:
        family = _family(item)
        return family + _BACKED if item.backed and family != ADAPTER else family

    def priority(self, item: Item) -> float:
        return item.score if item.backed and not item.is_adapter else item.score + item.weight

    def bias(self, kind: int) -> float:
        seconds = self.costs.load
        if kind in (KV_ONCE, KV_AGAIN):
            seconds = self.costs.recompute
        elif kind != ADAPTER:
            seconds = min(self.costs.recompute, self.costs.load)
        return math.log2(self.reuse.gain(kind % _BACKED) * seconds)

    def host_bias(self, kind: int) -> float:
        """A copy on the host saves what computing costs more than loading; all slots alike."""
        return math.log2(self.reuse.gain(kind % _BACKED))

    def expected_visits(self, item: Item) -> float:
        """How often the item will be used again."""
        if item.score == NEVER:
            return 0.0
        return self.reuse.gain(_family(item)) * self.reuse.weight(item.score, self.clock)

    def worth_host_copy(self, item: Item) -> bool:
        """Copying it there takes the link as long as one load; each later visit saves the rest."""
        load = self.costs.load_of(item)
        return self.expected_visits(item) * (self.costs.recompute_of(item) - load) > load

    def _weight_in_kind(self, item: Item) -> float:
        """``log2`` of its cost per slot over that of its kind: context makes KV dearer, latency
        small adapters. Kept from visit to visit, so that priorities do not fall."""
        if item.is_adapter:
            return math.log2(self.costs.load_of(item) / self.costs.load)
        return math.log2(self.costs.recompute_of(item) / self.costs.recompute)


def _family(item: Item) -> int:
    if item.is_adapter:
        return ADAPTER
    return KV_ONCE if item.visits <= 1 else KV_AGAIN
