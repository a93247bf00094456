"""What loads of adapters add to the time to first token, from rounds on three servers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Round:
    """Mean TTFT of the same requests on each server, in milliseconds."""

    ours: float
    blocking: float
    free: float


@dataclass(frozen=True, slots=True)
class Added:
    """What loads add to mean TTFT, in milliseconds, and which share less that is than where they
    block, with the bounds of its 95% interval."""

    ours: float
    blocking: float
    less: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"a load adds {self.ours:.2f} ms to TTFT, {self.blocking:.2f} ms where it blocks: "
            f"{self.less:.1%} less ({self.low:.1%} to {self.high:.1%})"
        )


def added(rounds: Sequence[Round], seed: int = 0) -> Added:
    """The interval is a percentile bootstrap over rounds (Efron and Tibshirani 1993, ch. 13)."""
    rng = random.Random(seed)
    resampled = sorted(_less(rng.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    low, high = resampled[round(0.025 * RESAMPLES)], resampled[round(0.975 * RESAMPLES) - 1]
    ours, blocking = _means(rounds)
    return Added(ours, blocking, _less(rounds), low, high)


def _means(rounds: Sequence[Round]) -> tuple[float, float]:
    ours = statistics.mean(found.ours - found.free for found in rounds)
    return ours, statistics.mean(found.blocking - found.free for found in rounds)


def _less(rounds: Sequence[Round]) -> float:
    ours, blocking = _means(rounds)
    return 1 - ours / blocking
