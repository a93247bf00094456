"""An estimator of the mean batch size over a sliding window of seconds."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0
"""Length of the window in seconds; longer is smoother and slower to follow a change. Source: ELORA
(HPCA 2026), ``BS``."""


class BatchSize:
    """Mean size of the batches of the last ``window_s`` seconds; O(1) amortised.

    Args:
        window_s: Length of the window in seconds.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._sizes: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, time_s: float, size: int) -> None:
        """Record a batch of ``size`` requests. Times must not decrease."""
        self._sizes.append((time_s, size))
        self._sum += size
        while self._sizes[0][0] < time_s - self._window_s:
            self._sum -= self._sizes.popleft()[1]

    @property
    def mean(self) -> float:
        """Mean number of requests per batch; 1 before the first batch."""
        return self._sum / len(self._sizes) if self._sizes else 1.0
