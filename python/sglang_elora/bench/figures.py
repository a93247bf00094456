"""One row of figures per run, ratios of runs, and tables of both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.record import Record

WARM_UP = 0.2  # of the trace's duration, at its beginning
COLUMNS = (
    "requests",
    "errors",
    "requests_per_s",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "ttft_p99_ms",
    "tpot_mean_ms",
    "goodput",
    "cached_device",
    "cached_host",
    "adapter_loads",
    "late_p99_ms",
)
TTFT_BAR_MS = 500.0
TPOT_BAR_MS = 50.0
_RATIOS = ("ttft_mean_ms", "ttft_p95_ms", "tpot_mean_ms", "requests_per_s")


@dataclass(frozen=True, slots=True)
class Bars:
    """What a request must stay under to count for goodput."""

    ttft_ms: float = TTFT_BAR_MS
    tpot_ms: float = TPOT_BAR_MS

    def met(self, record: Record) -> bool:
        """An answer of one token has no TPOT, and meets that bar."""
        if record.error is not None or record.ttft_s is None:
            return False
        return 1e3 * record.ttft_s <= self.ttft_ms and 1e3 * (record.tpot_s or 0) <= self.tpot_ms


BARS = Bars()


def counted(records: Sequence[Record], duration_s: float) -> list[Record]:
    """Those that were due after the warm-up."""
    return [record for record in records if record.due_s >= WARM_UP * duration_s]


def figures(
    records: Sequence[Record],
    duration_s: float,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    bars: Bars = BARS,
) -> dict[str, float | None]:
    """Figures of the counted requests; adapter loads are of the whole run, None if not known.

    ``requests_per_s`` is answers over the time from the end of the warm-up to the last of them,
    ``goodput`` the share of the requests that met both bars; those without an answer did not.
    ``late`` is how long after it was due the client sent a request.
    """
    mine = counted(records, duration_s)
    good = [record for record in mine if record.error is None]
    ttft = [1e3 * s for record in good if (s := record.ttft_s) is not None]
    tpot = [1e3 * s for record in good if (s := record.tpot_s) is not None]
    prompt = sum(record.num_prompt for record in good) or 1
    from_host = sum(record.num_from_host for record in good)
    ended_s = max((r.last_s for r in good if r.last_s is not None), default=duration_s)
    loads = None
    if before is not None and after is not None:
        loads = after["adapter_loads"] - before["adapter_loads"]
    return {
        "requests": len(mine),
        "errors": len(mine) - len(good),
        "requests_per_s": len(good) / (ended_s - WARM_UP * duration_s),
        "ttft_mean_ms": _mean(ttft),
        "ttft_p50_ms": _percentile(ttft, 50),
        "ttft_p95_ms": _percentile(ttft, 95),
        "ttft_p99_ms": _percentile(ttft, 99),
        "tpot_mean_ms": _mean(tpot),
        "goodput": sum(map(bars.met, mine)) / len(mine) if mine else None,
        "cached_device": (sum(record.num_cached for record in good) - from_host) / prompt,
        "cached_host": from_host / prompt,
        "adapter_loads": loads,
        "late_p99_ms": _percentile([1e3 * (r.sent_s - r.due_s) for r in good], 99),
    }


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over several runs; of a single run all three are the same."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3f}"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(
    ours: Mapping[int, Sequence[Record]],
    theirs: Mapping[int, Sequence[Record]],
    duration_s: float,
) -> dict[str, Spread]:
    """Ours over theirs per run, for each run that both have; below 1 is less.

    Only requests that both sides answered count: the slower side reaches fewer late turns.
    """
    values: dict[str, list[float]] = {name: [] for name in _RATIOS}
    for run in sorted(ours.keys() & theirs.keys()):
        sides = [{r.key: r for r in runs[run] if r.error is None} for runs in (ours, theirs)]
        common = sides[0].keys() & sides[1].keys()
        both = [key for key in common if all(s[key].due_s >= WARM_UP * duration_s for s in sides)]
        mine, their = (figures([side[key] for key in both], duration_s) for side in sides)
        for name in _RATIOS:
            numerator, denominator = mine[name], their[name]
            if numerator is not None and denominator:
                values[name].append(numerator / denominator)
    return {
        name: Spread(min(found), statistics.median(found), max(found))
        for name, found in values.items()
        if found
    }


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """A line per row under the names of ``COLUMNS``."""
    cells = ([label, *(cell(row[name]) for name in COLUMNS)] for label, row in rows.items())
    return plain_table(["", *COLUMNS], cells)


def medians(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of several runs, column by column."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    known = {name: [v for v in column if v is not None] for name, column in columns.items()}
    return {name: statistics.median(found) if found else None for name, found in known.items()}


def cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """With linear interpolation between the two nearest values."""
    return float(np.percentile(values, percent)) if values else None
