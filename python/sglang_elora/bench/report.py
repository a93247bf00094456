"""Tables and ratios from the files that ``sglang-elora bench`` wrote.

    python -m sglang_elora.bench.report DIR [--window 5] [--relative-to SIDE]

Per workload: a row per side with medians over its runs; then ratios of each ELORA side to each
stock side, per run. The static split with the lowest mean TTFT is named the best. With --window
also the mean TTFT over time, over all runs, in windows of that many seconds, and how long a side
takes to recover from a step in the number of active adapters.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.bench.figures import Spread, counted, medians, ratios, table
from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.record import Record
from sglang_elora.bench.result import Result, by_block, by_side, peak_of, read
from sglang_elora.workloads import GROWS_AT, WORKLOADS

TUNED = "stock-tuned:"
BEST = "best static split"
RECOVERED = 1.5


def peaks(rows: Sequence[Mapping[str, Any]]) -> str:
    """For runs with --peak, the rate up to which mean TTFT stays below the bar, by workload."""
    lines = []
    for row in rows:
        workload, factor = row["trace"]["workload"]["name"], peak_of(row)
        rate = "none" if factor is None else f"{factor * row['trace']['turns_per_s']:.1f} turns/s"
        bar = f"mean TTFT under {row['bar_ms']:.0f} ms"
        lines.append(f"{workload} {row['side']} {row['run']}: {rate} with {bar}")
    return "\n".join(sorted(lines))


def summary(results: Sequence[Result]) -> str:
    """Tables of one workload: all sides, and ratios of ELORA's sides to stock's."""
    runs = by_side(results)
    lines = [table(_rows(runs))]
    best = best_split(runs)
    if best is not None:
        lines.append(f"{BEST}: {best}")
    for (ours, stock), found in compared(results).items():
        figures_of = ", ".join(f"{name} {spread}" for name, spread in found.items())
        lines.append(f"{ours} / {stock}: {figures_of}")
    return "\n".join(lines)


def compared(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, Spread]]:
    """For one workload, the ratios of each ELORA side to stock's default and best split."""
    runs = by_side(results)
    stocks = {side: side for side in runs if not side.startswith(("elora", TUNED))}
    best = best_split(runs)
    if best is not None:
        stocks[BEST] = best
    return {
        (ours, name): ratios(_records(runs[ours]), _records(runs[side]), results[0].duration_s)
        for ours in runs
        if ours.startswith("elora")
        for name, side in stocks.items()
    }


def across(blocks: Mapping[str, Sequence[Result]]) -> str:
    """Mean of the workloads' median ratios, for the pairs of sides that all workloads have."""
    found = [compared(results) for results in blocks.values()]
    lines = [f"mean of the ratios of {', '.join(blocks)}"]
    for pair in found[0]:
        if all(pair in ratios_of for ratios_of in found):
            means = (
                f"{name} {statistics.mean(ratios_of[pair][name].median for ratios_of in found):.3f}"
                for name in found[0][pair]
            )
            lines.append(f"{' / '.join(pair)}: {', '.join(means)}")
    return "\n".join(lines)


def relative(blocks: Mapping[str, Sequence[Result]], base: str) -> str:
    """Mean TTFT of each side relative to ``base``, by workload, and the mean over workloads.

    Ratios are medians over the runs that both sides have.
    """
    found: dict[str, dict[str, float]] = {}
    for name, results in blocks.items():
        runs = by_side(results)
        for side in runs:
            ratio = ratios(_records(runs[side]), _records(runs[base]), results[0].duration_s)
            if "ttft_mean_ms" in ratio:
                found.setdefault(side, {})[name] = ratio["ttft_mean_ms"].median
    rows = []
    for side, by_workload in found.items():
        cells = [by_workload.get(name) for name in blocks]
        known = [cell for cell in cells if cell is not None]
        cells.append(statistics.mean(known) if len(known) == len(blocks) else None)
        rows.append([side, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    return f"mean TTFT over that of {base}\n{plain_table(['', *blocks, 'mean'], rows)}"


def best_split(runs: Mapping[str, Mapping[int, Result]]) -> str | None:
    """The stock-tuned side with the lowest mean TTFT among those with most runs, or None."""
    splits = {side: by_run for side, by_run in runs.items() if side.startswith(TUNED)}
    most = max(map(len, splits.values()), default=0)
    rows = _rows({side: by_run for side, by_run in splits.items() if len(by_run) == most})
    means = {side: row["ttft_mean_ms"] for side, row in rows.items()}
    known = {side: mean for side, mean in means.items() if mean is not None}
    return min(known, key=known.__getitem__, default=None)


def report(results: Sequence[Result]) -> str:
    """The tables of each workload and rate, and their mean."""
    blocks = by_block(results)
    texts = [f"{name}\n{summary(block)}" for name, block in blocks.items()]
    return "\n\n".join([*texts, *([across(blocks)] if len(blocks) > 1 else [])])


def over_time(results: Sequence[Result], window_s: float) -> str:
    """Table of mean TTFT in ms of one workload, by window of due times (columns) and side."""
    num_windows = math.ceil(results[0].duration_s / window_s)
    rows: dict[str, list[list[float]]] = {}
    for result in results:
        row = rows.setdefault(result.side, [[] for _ in range(num_windows)])
        for record in result.records:
            if record.ttft_s is not None:
                row[min(int(record.due_s / window_s), num_windows - 1)].append(record.ttft_s)
    head = ["", *(f"{window_s * i:.0f}" for i in range(num_windows))]
    cells = (
        [side, *(f"{1e3 * statistics.mean(found):.0f}" if found else "-" for found in row)]
        for side, row in rows.items()
    )
    return f"mean TTFT in ms, by seconds since the start\n{plain_table(head, cells)}"


def after_growth(results: Sequence[Result], window_s: float) -> str:
    """How each side copes with the growth of the active adapters in one workload, over all runs.
    It has recovered after the last window above ``RECOVERED`` times the mean before the growth."""
    duration_s = results[0].duration_s
    grows_s = GROWS_AT * duration_s
    lines = [f"active adapters grow at {grows_s:.0f} s: mean TTFT in ms"]
    for side, by_run in by_side(results).items():
        records = [r for result in by_run.values() for r in counted(result.records, duration_s)]
        ttft = [(r.due_s, 1e3 * r.ttft_s) for r in records if r.ttft_s is not None]
        before = statistics.mean(ms for due_s, ms in ttft if due_s < grows_s)
        windows: dict[int, list[float]] = {}
        for due_s, ms in ttft:
            if due_s >= grows_s:
                windows.setdefault(int((due_s - grows_s) / window_s), []).append(ms)
        means = {i: statistics.mean(windows[i]) for i in sorted(windows)}
        above = [i for i, mean in means.items() if mean > RECOVERED * before]
        took = "0 s" if not above else f"{(above[-1] + 1) * window_s:.0f} s"
        if above and above[-1] == max(means):
            took = f"not within {duration_s - grows_s:.0f} s"
        lines.append(
            f"{side}: {before:.0f} before, {statistics.mean(means.values()):.0f} after, "
            f"{max(means.values()):.0f} in the worst {window_s:.0f} s; recovered: {took}"
        )
    return "\n".join(lines)


def _rows(runs: Mapping[str, Mapping[int, Result]]) -> dict[str, dict[str, float | None]]:
    return {
        side: medians([result.figures() for result in by_run.values()])
        for side, by_run in runs.items()
    }


def _records(by_run: Mapping[int, Result]) -> dict[int, Sequence[Record]]:
    return {run: result.records for run, result in by_run.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=float, help="seconds")
    parser.add_argument("--relative-to", help="a side: mean TTFT of all others over its")
    options = parser.parse_args()
    rows = read(options.folder)
    if not rows:
        parser.error(
            f"{options.folder} has no files of runs; those of benchmarks/results are packed: "
            "`python benchmarks/results/rows.py unpack`"
        )
    if found := [row for row in rows if "rise" in row]:
        print(peaks(found))
    results = [Result.from_row(row) for row in rows if "rise" not in row]
    if results:
        print(report(results))
    if options.relative_to is not None:
        print(f"\n{relative(by_block(results), options.relative_to)}")
    if options.window is not None:
        for name, mine in by_block(results).items():
            print(f"\n{name}: {over_time(mine, options.window)}")
            workload = WORKLOADS.get(mine[0].workload)
            first, last = (1.0, 1.0) if workload is None else workload.active
            if first != last:
                print(f"\n{name}: {after_growth(mine, options.window)}")


if __name__ == "__main__":
    main()
