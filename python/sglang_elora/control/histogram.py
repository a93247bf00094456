"""A histogram of durations, with Prometheus's cumulative buckets."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the buckets; a last bucket is unbounded."""


class Histogram(msgspec.Struct, array_like=True):
    """Number of values in each bucket of ``SECONDS``, and the sum of the values."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum_s: float = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(SECONDS, value_s)] += 1
        self.sum_s += value_s

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound as Prometheus writes it, number of values up to it) of each bucket."""
        found, total = [], 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found
