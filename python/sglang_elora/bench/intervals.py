"""Ratios of two sides with confidence intervals, by bootstrap over sessions.

Requests of a session depend on each other (a late answer delays the next turn, and its KV may be
evicted meanwhile), so sessions are resampled and not requests. Sessions are drawn within each run,
so that every resample has all seeds. What sessions of a run have in common, such as a time of
overload, is therefore not in the interval: compare it with the range over runs (``by_run``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from sglang_elora.bench.record import Record

LEVEL = 0.95
NUM_RESAMPLES = 1_000
"""Raising it makes the ends of intervals less noisy, and reports slower."""

_PERCENTS: Mapping[str, Mapping[str, float | None]] = {
    "ttft_s": {"ttft_mean_ms": None, "ttft_p95_ms": 95.0},
    "tpot_s": {"tpot_mean_ms": None},
    "e2e_s": {"e2e_mean_ms": None},
}
"""Figures by the property of a record that they are of: a percentile, or None for the mean."""
_CHUNK = 100  # resamples at once; bounds the memory for percentiles

Array = np.ndarray[Any, np.dtype[np.float64]]
Runs = Mapping[int, Sequence[Record]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of one figure over the pooled runs of both sides, with its 95% interval.

    ``by_run`` has the ratio of each run by its number.
    """

    value: float
    low: float
    high: float
    by_run: Mapping[int, float]

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def with_runs(self) -> str:
        """Also the lowest and highest ratio of a run, if there are several."""
        if len(self.by_run) < 2:
            return str(self)
        lowest, highest = min(self.by_run.values()), max(self.by_run.values())
        return f"{self} (runs {lowest:.3f} to {highest:.3f})"


@dataclass(frozen=True, slots=True)
class _Pairs:
    """One value of requests that both sides have; ``session`` numbers sessions of all runs."""

    session: np.ndarray[Any, np.dtype[np.int64]]
    runs: Sequence[int]  # run of each session
    ours: Array
    theirs: Array


def ratios(ours: Runs, theirs: Runs, warm_up_s: float) -> dict[str, Ratio]:
    """Ratio ours / theirs of mean and P95 TTFT, TPOT and latency over the runs that both have.

    Only requests that both sides answered count, as the slower side reaches fewer late turns, and
    only those due after the warm-up on both.
    """
    answered = [
        (run, mine, their)
        for run in sorted(ours.keys() & theirs.keys())
        for mine, their in _both(ours[run], theirs[run], warm_up_s)
    ]
    found: dict[str, Ratio] = {}
    for value, names in _PERCENTS.items():
        pairs = _pairs(answered, attrgetter(value))
        if pairs is not None:
            weights = _weights(pairs.runs)
            found |= {name: _ratio(pairs, weights, percent) for name, percent in names.items()}
    return found


def _both(
    ours: Sequence[Record], theirs: Sequence[Record], warm_up_s: float
) -> list[tuple[Record, Record]]:
    """The counted requests that both sides answered, in the order of sessions and turns."""
    mine, their = (
        {r.key: r for r in records if r.error is None and r.due_s >= warm_up_s}
        for records in (ours, theirs)
    )
    return [(mine[key], their[key]) for key in sorted(mine.keys() & their.keys())]


def _pairs(
    answered: Sequence[tuple[int, Record, Record]], value: Callable[[Record], float | None]
) -> _Pairs | None:
    """The pairs of one value; None if there is none, or theirs are all zero."""
    numbers: dict[tuple[int, int], int] = {}
    rows: list[tuple[int, float, float]] = []
    for run, mine, their in answered:
        ours, theirs = value(mine), value(their)
        if ours is not None and theirs is not None:
            rows.append((numbers.setdefault((run, mine.session), len(numbers)), ours, theirs))
    if not any(theirs for _, _, theirs in rows):
        return None
    columns = np.array(rows, dtype=np.float64).T
    runs = [run for run, _ in numbers]
    return _Pairs(columns[0].astype(np.int64), runs, columns[1], columns[2])


def _ratio(pairs: _Pairs, weights: Array, percent: float | None) -> Ratio:
    samples = _resampled(pairs, weights, percent)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    runs = np.array(pairs.runs)[pairs.session]
    by_run = {
        int(run): _of(pairs.ours[runs == run], percent) / their
        for run in dict.fromkeys(pairs.runs)
        if (their := _of(pairs.theirs[runs == run], percent))
    }
    value = _of(pairs.ours, percent) / _of(pairs.theirs, percent)
    return Ratio(value, float(low), float(high), by_run)


def _of(values: Array, percent: float | None) -> float:
    return float(np.mean(values) if percent is None else np.percentile(values, percent))


def _weights(runs: Sequence[int]) -> Array:
    """How often each session is drawn in each resample: ``[resamples, sessions]``."""
    rng = np.random.default_rng(0)
    of_run, columns = np.array(runs), np.zeros((NUM_RESAMPLES, len(runs)))
    for run in dict.fromkeys(runs):
        mine = np.flatnonzero(of_run == run)
        equal = np.full(len(mine), 1 / len(mine))
        columns[:, mine] = rng.multinomial(len(mine), equal, size=NUM_RESAMPLES)
    return columns


def _resampled(pairs: _Pairs, weights: Array, percent: float | None) -> Array:
    """The ratio in each resample: ``[resamples]``."""
    if percent is None:
        sums = [
            np.bincount(pairs.session, values, minlength=weights.shape[1])
            for values in (pairs.ours, pairs.theirs)
        ]
        mine, their = (weights @ total for total in sums)  # of equally many requests
        return np.asarray(mine / their)
    mine, their = (
        _quantiles(v, pairs.session, weights, percent) for v in (pairs.ours, pairs.theirs)
    )
    return np.asarray(mine / their)


def _quantiles(values: Array, session: Any, weights: Array, percent: float) -> Array:
    """The percentile of the values in each resample, as the smallest value that reaches it."""
    order = np.argsort(values)
    ordered, owner = values[order], session[order]
    found = []
    for first in range(0, len(weights), _CHUNK):
        below = np.cumsum(weights[first : first + _CHUNK][:, owner], axis=1)
        reached = below >= percent / 100 * below[:, -1:]
        found.append(ordered[np.argmax(reached, axis=1)])
    return np.concatenate(found)
