"""The largest factor on a trace's rate that a side bears."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest_factor(
    bears: Callable[[float], bool], low: float, high: float, num_steps: int
) -> float | None:
    """Bisection between two factors, in logarithms, since rates compare by ratio.

    Args:
        bears: Whether a rate ``factor`` times the trace's is borne; each call is a run of a server.
        num_steps: Calls after the first two; each halves the interval.

    Returns:
        The largest factor that was borne, None if ``low`` was not.
    """
    if not 0 < low < high:
        raise ValueError(f"rate factors must be 0 < low < high, got {low} and {high}")
    if not bears(low):
        return None
    if bears(high):
        return high
    for _ in range(num_steps):
        middle = math.sqrt(low * high)
        if bears(middle):
            low = middle
        else:
            high = middle
    return low
