"""Largest sustainable rate of a server, from one run of a trace with a rising rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sglang_elora.workloads import Rise

WINDOWS = 20
"""Windows of a rise, with equal rate ratios: for a rise from 0.5 to 5, each ends 12% above its
start. Raising it makes the result finer and noisier."""


def peak_factor(
    ttft: Sequence[tuple[float, float]], rise: Rise, bar_s: float, num_windows: int = WINDOWS
) -> float | None:
    """The rate factor at the end of the last window whose mean TTFT is below the bar.

    Args:
        ttft: (due time, seconds to the first token) of each request; infinity for an error.
        num_windows: Number of windows with equal rate ratios, and about equally many requests.

    Returns:
        None if no window is below the bar.
    """
    windows: dict[int, list[float]] = {}
    for due_s, ttft_s in ttft:
        number = min(int(rise.share_at(due_s) * num_windows), num_windows - 1)
        windows.setdefault(number, []).append(ttft_s)
    under = [i for i, found in windows.items() if statistics.mean(found) < bar_s]
    return rise.factor_behind((max(under) + 1) / num_windows) if under else None
