"""Past work by adapter, of which older work counts less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

HALF_LIFE_S = 30.0
"""Seconds in which past work halves. Lower follows changes sooner, and moves more."""

LEAST = 1.0
"""Work below which an adapter is forgotten."""


class Loads:
    """Decayed sums of work, in any unit.

    Args:
        now_s: Any clock in seconds.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._decayed_s = now_s

    def add(self, name: str, work: float) -> None:
        self._sums[name] += work

    def decay(self, now_s: float) -> Mapping[str, float]:
        """Let past work decay until now; returns what is left, without adapters that have none."""
        factor = 0.5 ** ((now_s - self._decayed_s) / HALF_LIFE_S)
        self._decayed_s = now_s
        left = {name: factor * work for name, work in self._sums.items() if factor * work > LEAST}
        self._sums = defaultdict(float, left)
        return left
