"""Probability of each adapter to be used by the next request, under drifting popularity."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

FAST, SLOW = 100.0, 1000.0
"""Half-lives of a use, in requests. The fast one follows changes, the slow one resolves rare
adapters; higher values are smoother and slower."""

MOST_ROWS = 4096
"""Most adapters with a share; more make ``expected_distinct`` slower. The least recently used one
beyond it has not been used for this many requests, and has kept less than 6% of the slow half of
its share."""

_RESCALE_ABOVE = 1e200
"""Weight of a use above which all weights are scaled down, to avoid overflow."""


class Popularity:
    """Each adapter's share of requests: the mean of a fast and a slow exponential average.

    Time is the number of requests, so that it is equal on all ranks. ``use`` is O(1) amortised.
    The code that removes an adapter calls ``forget``; at most ``MOST_ROWS`` adapters are kept.
    """

    def __init__(self, half_lives: tuple[float, float] = (FAST, SLOW)) -> None:
        self._growth = np.array([2 ** (1 / half_life) for half_life in half_lives])
        self._unit = np.ones(2)  # weight of the next use; it grows instead of old ones decaying
        self._rows: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._free: list[int] = []
        self._weights: NDArray[np.float64] = np.zeros((0, 2))

    def __len__(self) -> int:
        """Number of adapters that have a share."""
        return len(self._rows)

    def use(self, adapter_id: str) -> None:
        """Record that a request used this adapter."""
        self._unit = self._unit * self._growth
        if self._unit.max() > _RESCALE_ABOVE:
            self._weights /= self._unit
            self._unit = np.ones(2)
        row = self._row(adapter_id)  # may move the table
        self._weights[row] += self._unit

    def forget(self, adapter_id: str) -> None:
        """Remove an adapter; its share is distributed over the others."""
        row = self._rows.pop(adapter_id, None)
        if row is not None:
            self._weights[row] = 0
            self._free.append(row)

    def share(self, adapter_id: str) -> float:
        """Probability that the next request uses the adapter; 0 if none has used it."""
        row = self._rows.get(adapter_id)
        return 0.0 if row is None else float(self._shares()[row])

    def expected_distinct(self, batch_size: float) -> float:
        """``sum over j of 1 - (1 - p_j) ** batch_size``: adapters that a batch is expected to use.

        Source: ELORA (HPCA 2026), ``Low_lora``. O(``MOST_ROWS``), vectorised.
        """
        if not self._rows:
            return 0.0
        return float((1 - (1 - self._shares()) ** batch_size).sum())

    def _shares(self) -> NDArray[np.float64]:
        """Shares ``[rows]``; their sum is 1 once any adapter was used."""
        totals = self._weights.sum(axis=0)
        if not totals.all():
            return np.zeros(len(self._weights))
        shares: NDArray[np.float64] = (self._weights / totals).mean(axis=1)
        return shares

    def _row(self, adapter_id: str) -> int:
        row = self._rows.get(adapter_id)
        if row is not None:
            self._rows.move_to_end(adapter_id)
            return row
        if len(self._rows) == MOST_ROWS:
            self.forget(next(iter(self._rows)))
        if not self._free:
            size = len(self._weights)
            num_new = min(size + 16, MOST_ROWS - size)
            self._free = list(range(size, size + num_new))
            self._weights = np.concatenate([self._weights, np.zeros((num_new, 2))])
        row = self._rows[adapter_id] = self._free.pop()
        return row
