"""When items come back, learned per kind: hit density.

An item that was used ``age`` turnovers ago may come back soon, later, or never. What it is worth to
keep is the chance that it comes back within some time, per turnover that it would take space for:

    ``hit_density(age) = max over T of P(back within T) / E[time until it is back, T at most]``

the Gittins index of a bandit that pays once, which for caches is known as hit density (Beckmann,
Chen, Cidon: "LHD", NSDI 2018). It is computed from a life table: per bin of ages, how many items
came back in it, of those that reached it. An item that was evicted counts as seen until then
and not as one that never came back; so a cache under pressure does not teach itself that nothing
returns.
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

_FIT_AFTER, _FIT_AT_LATEST = 64, 128  # ends of a kind
_FORGET_EVERY, _KEPT = 512, 0.7
_PRIOR_RATE = 0.02 / (_LOWER + _FIRST) ** 1.5
_PRIOR_WEIGHT = 0.5
"""Returns per turnover assumed before anything is seen, and the items that counts as: they become
rarer with age, so that items are ordered by their last use, and after the last age seen are few."""

_HOPE, _HOPE_WEIGHT = 0.06, 2.0
"""Share assumed to come back within each bin that few have reached, for ``chance``: what was never
kept for so long has to be kept for once before anybody knows. 0.06 in each is 0.5 in ten bins."""


class ReuseTable:
    """The life table of one kind. ``hit_density`` is a lookup; ``end`` is O(1) amortised.

    What was learned takes effect with ``learn``, which takes 0.1 ms where there is something new:
    whoever has a moment to spare calls it. Without that it is done now and then by ``end``.
    """

    def __init__(self) -> None:
        self._returned: NDArray[np.float64] = np.zeros(_BINS)  # ends by a return, per bin
        self._ended: NDArray[np.float64] = np.zeros(_BINS)  # all ends
        self._num_ends = self._num_fitted = 0
        self._fit()

    def end(self, age: float, *, returned: bool) -> None:
        """An item came back, or left, ``age`` turnovers after its last use."""
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
        """Take over what has ended since the last time, if that is not too little."""
        is_due = self._num_ends - self._num_fitted >= _FIT_AFTER
        if is_due:
            self._fit()
        return is_due

    def hit_density(self, age: float) -> float:
        """Chance of a return per turnover, at the best time to give up; never rises with age."""
        return self._density[self._bin(age)]

    def hit_density_at(self, age: float) -> float:
        """The same, which may rise: when many come back at a certain age, it does towards that."""
        return self._density_at[self._bin(age)]

    def chance(self, age: float) -> float:
        """Probability that the item is used again, hopeful about ages that nothing has reached."""
        return self._chance[self._bin(age)]

    @staticmethod
    def _bin(age: float) -> int:
        if age < _FIRST:
            return 0
        return _BINS - 1 if age >= _LAST else int(2 * math.log2(age / _FIRST)) + 1

    def _fit(self) -> None:
        self._num_fitted = self._num_ends
        reached = self._ended[::-1].cumsum()[::-1]
        gone = self._ended - self._returned  # were there for half of the bin, on average
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
