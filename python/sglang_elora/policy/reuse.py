"""How often items come back, learned per kind.

A visit's weight halves every ``half_life`` turnovers. The sum of an item's weights, ``w``, would be
the number of visits still to come if the future were like the past: visits at a rate of
``w ln 2 / half_life`` now, falling as the weight does, add up to ``w``. Some kinds of items do
better than that and others worse: the end of a conversation comes back soon, a translated sentence
never. ``gain`` is what was seen per visit foreseen, so ``gain * w`` is the expectation.
"""

from __future__ import annotations

import math

_PRIOR = 4.0
"""Visits foreseen before a gain moves far from 1."""

_MEMORY = 4.0
"""Half-lives after which what was seen counts half."""


class Reuse:
    """Visits foreseen and seen, per kind.

    Args:
        num_kinds: Kinds of items.
        half_life: Turnovers.
    """

    def __init__(self, num_kinds: int, half_life: float) -> None:
        self.half_life = half_life
        self._weights = [0.0] * num_kinds  # of all items of a kind, now
        self._foreseen = [0.0] * num_kinds
        self._seen = [0.0] * num_kinds

    def advance(self, turnovers: float) -> None:
        """Time passes: what was to come in it was foreseen."""
        kept = 2 ** (-turnovers / self.half_life)
        remembered = 2 ** (-turnovers / self.half_life / _MEMORY)
        for kind, weight in enumerate(self._weights):
            self._foreseen[kind] = remembered * self._foreseen[kind] + weight * (1 - kept)
            self._seen[kind] *= remembered
            self._weights[kind] = kept * weight

    def enter(self, kind: int, weight: float) -> None:
        """An item of this weight is of this kind from now on."""
        self._weights[kind] += weight

    def leave(self, kind: int, weight: float) -> None:
        self._weights[kind] = max(0.0, self._weights[kind] - weight)

    def see(self, kind: int) -> None:
        """An item of this kind was visited again."""
        self._seen[kind] += 1

    def gain(self, kind: int) -> float:
        """Visits seen per visit foreseen; 1 as long as nothing is known."""
        return (self._seen[kind] + _PRIOR) / (self._foreseen[kind] + _PRIOR)

    def weight(self, score: float, clock: float) -> float:
        """Of an item whose visits add up to ``score`` (see ``add_visit``)."""
        return float(2 ** (score - clock / self.half_life))

    def add_visit(self, score: float, clock: float) -> float:
        """``log2`` of the weights' sum with one more visit now, in a frame that moves with time.

        In that frame a visit at time ``t`` weighs ``2 ** (t / half_life)`` for ever, so two items
        keep their order while time passes.
        """
        now = clock / self.half_life
        low, high = (score, now) if score < now else (now, score)
        return high + math.log2(1 + 2 ** (low - high))
