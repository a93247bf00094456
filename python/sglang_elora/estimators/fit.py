"""Least squares over a stream of observations, with exponentially decaying weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

OUTLIER = 8.0
"""An observation above this multiple of the fit is an outlier: a kernel was compiled in the batch,
or the process was stopped."""
OUTLIERS_IN_A_ROW = 3
"""Outliers in a row that are ignored; the next one is followed, as the cost has changed."""


class DecayedFit:
    """Fit of ``y = coefficients . x`` to all observations, with weights that decay.

    Single observations far above the fit are ignored.

    A prior that counts as ``prior_weight`` observations of each feature keeps the fit defined
    while the observations do not determine all features.

    Args:
        prior: Initial coefficients ``[features]``, positive.
        scale: A typical value of each feature ``[features]``.
        memory: Half-life of an observation's weight, in observations.
        prior_weight: Weight of the prior, in observations; it does not decay.
    """

    def __init__(
        self,
        prior: tuple[float, ...],
        scale: tuple[float, ...],
        *,
        memory: float = 200.0,
        prior_weight: float = 0.05,
    ) -> None:
        self._scale = np.array(scale)
        self._prior = np.array(prior) * self._scale
        self._prior_weight = prior_weight
        self._kept = 2 ** (-1 / memory)
        self._xx: NDArray[np.float64] = np.zeros((len(prior), len(prior)))
        self._xy: NDArray[np.float64] = np.zeros(len(prior))
        self.num_observations = 0
        self._usual: NDArray[np.float64] | None = None  # the last fit
        self._num_outliers = 0  # in a row

    def add(self, x: tuple[float, ...], y: float) -> None:
        row = np.array(x) / self._scale
        if self._usual is not None and y > OUTLIER * float(self._usual @ row):
            self._num_outliers += 1
            if self._num_outliers <= OUTLIERS_IN_A_ROW:
                return
        else:
            self._num_outliers = 0
        self._xx = self._kept * self._xx + np.outer(row, row)
        self._xy = self._kept * self._xy + y * row
        self.num_observations += 1

    def coefficients(self) -> tuple[float, ...]:
        """The fitted coefficients, constrained to be at least a thousandth of the prior."""
        weight = self._prior_weight * np.eye(len(self._prior))
        xx, xy = self._xx + weight, self._xy + self._prior_weight * self._prior
        solved = np.linalg.solve(xx, xy)
        if solved.min() < 0:
            lower = np.linalg.cholesky(xx)
            solved, _ = nnls(lower.T, np.linalg.solve(lower, xy))
        solved = np.maximum(solved, self._prior / 1000)
        if self.num_observations:
            self._usual = solved
        return tuple((solved / self._scale).tolist())
