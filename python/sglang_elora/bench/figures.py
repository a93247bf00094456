"""Metrics per run, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.record import Record

WARM_UP = 0.2  # least share of the trace's duration, at its beginning, that is not counted
WARM_UP_MOST = 0.5  # largest share, if a session lives longer
COLUMNS = (
    "requests",
    "errors",
    "requests_per_s",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "ttft_p99_ms",
    "tpot_mean_ms",
    "e2e_mean_ms",
    "goodput",
    "cached_device",
    "cached_host",
    "adapter_loads",
    "late_p99_ms",
)
TTFT_BAR_MS = 500.0
TPOT_BAR_MS = 50.0


@dataclass(frozen=True, slots=True)
class Bars:
    """Largest TTFT and TPOT, in ms, of a request that counts for goodput."""

    ttft_ms: float = TTFT_BAR_MS
    tpot_ms: float = TPOT_BAR_MS

    def met(self, record: Record) -> bool:
        """Whether a request meets both bars; an answer of one token meets the bar for TPOT."""
        if record.error is not None or record.ttft_s is None:
            return False
        return 1e3 * record.ttft_s <= self.ttft_ms and 1e3 * (record.tpot_s or 0) <= self.tpot_ms


BARS = Bars()


def warm_up_s(duration_s: float, session_life_s: float = 0.0) -> float:
    """Seconds at the beginning of a trace whose requests are not counted.

    A trace begins with sessions that are under way and whose KV is nowhere, so the mean life of a
    session is left out, but at most half of the trace, and at least a fifth.
    """
    return min(max(WARM_UP * duration_s, session_life_s), WARM_UP_MOST * duration_s)


def counted(records: Sequence[Record], warm_up_s: float) -> list[Record]:
    """The records that were due after the warm-up."""
    return [record for record in records if record.due_s >= warm_up_s]


def figures(
    records: Sequence[Record],
    warm_up_s: float,
    duration_s: float,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    bars: Bars = BARS,
) -> dict[str, float | None]:
    """Metrics of the counted requests; adapter loads are of the whole run, None if unknown.

    ``requests_per_s`` is answers over the time from the end of the warm-up to the last of them,
    ``goodput`` the share of the requests that met both bars (unanswered ones do not). ``late`` is
    the client's delay in sending a request after it was due.
    """
    mine = counted(records, warm_up_s)
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
        "requests_per_s": len(good) / (ended_s - warm_up_s),
        "ttft_mean_ms": _mean(ttft),
        "ttft_p50_ms": _percentile(ttft, 50),
        "ttft_p95_ms": _percentile(ttft, 95),
        "ttft_p99_ms": _percentile(ttft, 99),
        "tpot_mean_ms": _mean(tpot),
        "e2e_mean_ms": _mean([1e3 * s for record in good if (s := record.e2e_s) is not None]),
        "goodput": sum(map(bars.met, mine)) / len(mine) if mine else None,
        "cached_device": (sum(record.num_cached for record in good) - from_host) / prompt,
        "cached_host": from_host / prompt,
        "adapter_loads": loads,
        "late_p99_ms": _percentile([1e3 * (r.sent_s - r.due_s) for r in good], 99),
    }


def table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """A text table with one line per row and the columns ``COLUMNS``."""
    cells = ([label, *(cell(row[name]) for name in COLUMNS)] for label, row in rows.items())
    return plain_table(["", *COLUMNS], cells)


def medians(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median of each column over several runs."""
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
    """A percentile, with linear interpolation between the two nearest values."""
    return float(np.percentile(values, percent)) if values else None
