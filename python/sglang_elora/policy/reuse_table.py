"""Hit density as a function of age, learned from the reuse of entries.

An entry last used ``age`` turnovers ago may be used again soon, later, or never. The value of
keeping it is its chance of a hit within some time, per turnover during which it takes space:

    ``hit_density(age) = max over T of P(hit within T) / E[min(time until the hit, T)]``

This is the Gittins index of a bandit that pays once, known for caches as hit density (Beckmann,
Chen, Cidon: "LHD", NSDI 2018). It is computed from a life table: per bin of ages, the share of
entries that were hit in it, of those that reached it. Evicted entries are censored observations
(seen until their eviction, outcome unknown), so a cache under pressure does not learn that nothing
is ever reused.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_BINS = 36
_FIRST = 2.0**-10  # turnovers; bins are half an octave wide above
_EDGES = np.array([0.0, *(_FIRST * 2 ** (i / 2) for i in range(_BINS))])
_LOWER = _EDGES[:-1]
_WIDTHS = np.diff(_EDGES)
_LAST = float(_LOWER[-1])
_BEGIN, _END = np.triu_indices(_BINS)

_FIT_AFTER, _FIT_AT_LATEST = 64, 128  # new ends: ``learn`` fits after 64, ``end`` after 128
_FORGET_EVERY, _KEPT = 512, 0.7  # every 512 ends, older observations are scaled by 0.7
_PRIOR_RATE = 0.02 / (_LOWER + _FIRST) ** 1.5
_PRIOR_WEIGHT = 0.5
"""Hits per turnover that are assumed without observations, and the number of entries which that
prior counts as. The rate falls with age: without observations the order is by last use."""

_HOPE, _HOPE_WEIGHT = 0.06, 2.0
"""Prior of ``chance``: share of hits assumed per bin, and the entries which that counts as. It is
optimistic, so that entries are kept to ages which none has reached yet, and their reuse is
observed. 0.06 per bin is about 0.5 over ten bins."""


class ReuseTable:
    """The life table of one class of entries. ``hit_density`` is a lookup; ``end`` is O(1)
    amortised.

    Observations take effect at the next fit, which takes 0.1 ms. The owner calls ``learn`` when it
    is idle; otherwise ``end`` fits after ``_FIT_AT_LATEST`` observations.
    """

    def __init__(self) -> None:
        self._returned: NDArray[np.float64] = np.zeros(_BINS)  # hits per bin of ages
        self._ended: NDArray[np.float64] = np.zeros(_BINS)  # hits and removals per bin
        self._num_ends = self._num_fitted = 0
        self._fit()

    def end(self, age: float, *, returned: bool) -> None:
        """Record a hit or a removal, ``age`` turnovers after the last use."""
        bin_ = self._bin(age)
        self._returned[bin_] += returned
        self._ended[bin_] += 1
        self._num_ends += 1
        if self._num_ends % _FORGET_EVERY == 0:
            self._returned *= _KEPT
            self._ended *= _KEPT
        if self._num_ends - self._num_fitted >= _FIT_AT_LATEST:
            self._fit()

    def learn(self) -> bool:
        """Fit the table again if there are enough new observations. Returns whether it did."""
        is_due = self._num_ends - self._num_fitted >= _FIT_AFTER
        if is_due:
            self._fit()
        return is_due

    def hit_density(self, age: float) -> float:
        """Chance of a hit per turnover for the best time to keep it; never rises with age."""
        return self._density[self._bin(age)]

    def hit_density_at(self, age: float) -> float:
        """As ``hit_density``, but it may rise with age, towards an age at which hits are common."""
        return self._density_at[self._bin(age)]

    def chance(self, age: float) -> float:
        """Probability of another hit; optimistic for ages that no entry has reached."""
        return self._chance[self._bin(age)]

    @staticmethod
    def _bin(age: float) -> int:
        if age < _FIRST:
            return 0
        return _BINS - 1 if age >= _LAST else int(2 * math.log2(age / _FIRST)) + 1

    def _fit(self) -> None:
        self._num_fitted = self._num_ends
        reached = self._ended[::-1].cumsum()[::-1]
        gone = self._ended - self._returned  # removed entries were seen for half a bin on average
        seen = reached - gone / 2
        hopeful = (self._returned + _HOPE_WEIGHT * _HOPE) / (seen + _HOPE_WEIGHT)
        self._chance: list[float] = (1 - np.cumprod(1 - hopeful[::-1])[::-1]).tolist()
        prior = 1 - np.exp(-_PRIOR_RATE * _WIDTHS)
        back = (self._returned + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT)
        alive = np.concatenate([[1.0], np.cumprod(1 - back)[:-1]])
        returns = np.concatenate([[0.0], np.cumsum(alive * back)])  # before each edge
        time = np.concatenate([[0.0], np.cumsum(alive * _WIDTHS * (1 - back / 2))])
        alive = np.maximum(alive, 1e-300)
        gained = returns[_END + 1] - returns[_BEGIN]
        density = np.zeros((_BINS, _BINS))
        density[_BEGIN, _END] = gained / np.maximum(time[_END + 1] - time[_BEGIN], 1e-300)
        best = density.max(axis=1)
        self._density_at: list[float] = best.tolist()
        self._density: list[float] = np.minimum.accumulate(best).tolist()
