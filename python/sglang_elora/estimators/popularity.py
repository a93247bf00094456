"""How likely each adapter is to be used next, under drift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAST, SLOW = 100.0, 1000.0
"""Half-lives, in requests. The fast one follows a change, the slow one knows rare adapters."""

_RESCALE_ABOVE = 1e200


class Popularity:
    """Shares of requests, each the mean of a share that forgets fast and one that forgets slowly.

    Time is the number of requests, so that it is equal on all ranks. ``use`` is O(1).
    """

    def __init__(self, half_lives: tuple[float, float] = (FAST, SLOW)) -> None:
        self._growth = np.array([2 ** (1 / half_life) for half_life in half_lives])
        self._unit = np.ones(2)  # weight of a use now; older ones keep theirs
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._weights: NDArray[np.float64] = np.zeros((0, 2))

    def use(self, uid: str) -> None:
        """A request used this adapter."""
        self._unit = self._unit * self._growth
        if self._unit.max() > _RESCALE_ABOVE:
            self._weights /= self._unit
            self._unit = np.ones(2)
        row = self._row(uid)  # may move the table
        self._weights[row] += self._unit

    def forget(self, uid: str) -> None:
        """The adapter is gone; what was its share is the others'."""
        row = self._rows.pop(uid, None)
        if row is not None:
            self._weights[row] = 0
            self._free.append(row)

    def share(self, uid: str) -> float:
        """Probability that the next request uses it; 0 if none ever did."""
        row = self._rows.get(uid)
        return 0.0 if row is None else float(self._shares()[row])

    def expected_distinct(self, batch_size: float) -> float:
        """``sum over j of 1 - (1 - p_j) ** batch_size``: adapters that a batch is expected to use.

        Source: ELORA (HPCA 2026), ``Low_lora``. O(adapters), vectorised.
        """
        if not self._rows:
            return 0.0
        return float((1 - (1 - self._shares()) ** batch_size).sum())

    def _shares(self) -> NDArray[np.float64]:
        """``[adapters]``, summing to 1 once any was used."""
        totals = self._weights.sum(axis=0)
        if not totals.all():
            return np.zeros(len(self._weights))
        shares: NDArray[np.float64] = (self._weights / totals).mean(axis=1)
        return shares

    def _row(self, uid: str) -> int:
        row = self._rows.get(uid)
        if row is None:
            if not self._free:
                size = len(self._weights)
                self._free = list(range(size, 2 * size + 16))
                self._weights = np.concatenate([self._weights, np.zeros((size + 16, 2))])
            row = self._rows[uid] = self._free.pop()
        return row
