"""The mean size of batches over the last seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0
"""Source: ELORA (HPCA 2026), ``BS``."""


class BatchSize:
    """Mean over the batches of the last ``window_s`` seconds; O(1) amortised.

    Args:
        window_s: Seconds.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._sizes: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, time_s: float, size: int) -> None:
        """A batch of so many requests ran. Times do not go back."""
        self._sizes.append((time_s, size))
        self._sum += size
        while self._sizes[0][0] < time_s - self._window_s:
            self._sum -= self._sizes.popleft()[1]

    @property
    def mean(self) -> float:
        """1 before the first batch: the request that is about to come."""
        return self._sum / len(self._sizes) if self._sizes else 1.0
