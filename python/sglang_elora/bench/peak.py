"""The largest rate that a side bears: one run of a trace that becomes faster and faster."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sglang_elora.workloads import Rise

WINDOWS = 20
"""Of a rise, by equal ratios: from half to five times the rate, each ends 12% above its start."""


def peak_factor(
    ttft: Sequence[tuple[float, float]], rise: Rise, bar_s: float, num_windows: int = WINDOWS
) -> float | None:
    """The factor up to which mean TTFT stays under the bar, for all windows behind are above it.

    Args:
        ttft: (when it was due, seconds to the first token) of each request; infinity for an error.
        num_windows: Parts of the rise by equal ratios: about as many requests fall into each.

    Returns:
        At the end of the last window whose mean is below the bar; None if there is none.
    """
    windows: dict[int, list[float]] = {}
    for due_s, ttft_s in ttft:
        number = min(int(rise.share_at(due_s) * num_windows), num_windows - 1)
        windows.setdefault(number, []).append(ttft_s)
    under = [i for i, found in windows.items() if statistics.mean(found) < bar_s]
    return rise.factor_behind((max(under) + 1) / num_windows) if under else None
