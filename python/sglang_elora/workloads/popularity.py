"""Distributions of adapter popularity, by rank."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, pairwise


class Law(StrEnum):
    """Distribution of requests over adapters of rank r = 0, 1, ..., n - 1, with parameter
    ``skew``."""

    ZIPF = "zipf"  # (1 + r) ** -skew
    POWER = "power"  # r = x * n with x ** skew uniform in 0 to 1 (S-LoRA); less even below 1
    GEOMETRIC = "geometric"  # (1 - skew) ** r: the first adapter has the share skew
    DISTINCT = "distinct"  # round-robin over all adapters; ignores skew
    GAUSSIAN = "gaussian"  # exp(-(r / (skew * n)) ** 2 / 2): half of a bell


def shares(law: Law, skew: float, count: int) -> list[float]:
    """Unnormalised weights of ``count`` adapters, most popular first.

    Raises:
        ValueError: The skew is outside the law's range.
    """
    if count < 1:
        raise ValueError(f"popularity is of at least one adapter, got {count}")
    if law is Law.ZIPF and skew >= 0:
        return [(1 + rank) ** -skew for rank in range(count)]
    if law is Law.POWER and skew > 0:
        edges = [(rank / count) ** skew for rank in range(count + 1)]
        return [high - low for low, high in pairwise(edges)]
    if law is Law.GEOMETRIC and 0 < skew < 1:
        return [(1 - skew) ** rank for rank in range(count)]
    if law is Law.GAUSSIAN and skew > 0:
        return [math.exp(-((rank / (skew * count)) ** 2) / 2) for rank in range(count)]
    if law is Law.DISTINCT:
        return [1.0] * count
    raise ValueError(
        f"skew {skew} is none of {law.value}'s: zipf takes 0 and above, power and gaussian above "
        "0, geometric between 0 and 1"
    )


def draw(law: Law, skew: float, count: int, number: int, rng: random.Random) -> int:
    """The rank of a random adapter; ``number`` counts draws, for ``DISTINCT``. O(log adapters)."""
    if law is Law.DISTINCT:
        return number % count
    return rng.choices(range(count), cum_weights=_cumulative(law, skew, count))[0]


@lru_cache(maxsize=64)
def _cumulative(law: Law, skew: float, count: int) -> Sequence[float]:
    return list(accumulate(shares(law, skew, count)))
