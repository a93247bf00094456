"""Which hints are worth sending now."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

GAP_S = 0.5
"""An adapter is not announced again within this time: what was said still holds."""

MOST_PER_S = 400.0
"""Hints about as many adapters are sent in a second, and no more: as many loads of an adapter of 30
MB take 12 GB/s of the link, and one that is not announced begins some milliseconds later."""

_MOST_REMEMBERED = 4_096


class HintLimiter:
    """Lets hints through, coalesced by adapter and bounded in rate. O(1) per adapter.

    What does not pass is not kept for later: by then the request itself is with the scheduler.

    Args:
        clock: Seconds, monotonic.
        gap_s: Between two hints about one adapter.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, gap_s: float = GAP_S
    ) -> None:
        self._clock, self._gap_s = clock, gap_s
        self._said_s: dict[str, float] = {}  # in the order in which it was said
        self._allowance, self._allowed_s = MOST_PER_S, clock()
        self.num_repeated = 0
        self.num_over_rate = 0

    def admit(self, adapters: Iterable[str]) -> list[str]:
        """Those of the adapters that are to be announced now, each once."""
        now_s = self._clock()
        earned = (now_s - self._allowed_s) * MOST_PER_S
        self._allowance, self._allowed_s = min(MOST_PER_S, self._allowance + earned), now_s
        passing = []
        for adapter in dict.fromkeys(adapters):
            if now_s - self._said_s.get(adapter, float("-inf")) < self._gap_s:
                self.num_repeated += 1
            elif self._allowance < 1:
                self.num_over_rate += 1
            else:
                self._allowance -= 1
                self._said_s.pop(adapter, None)
                self._said_s[adapter] = now_s
                passing.append(adapter)
        while len(self._said_s) > _MOST_REMEMBERED:
            del self._said_s[next(iter(self._said_s))]
        return passing
