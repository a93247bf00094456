"""Tables and ratios from the files that ``sglang-elora bench`` wrote.

    python -m sglang_elora.bench.report DIR [--window 5] [--relative-to SIDE]

The main table (``main_table``); then per workload a row per side with medians over its runs, and
ratios of each ELORA side to each of stock's systems with 95% intervals by bootstrap over sessions
(``intervals``). The static split with the lowest mean TTFT is named the best. With --window also
the mean TTFT over time, over all runs, in windows of that many seconds, and how long a side takes
to recover from a step in the number of active adapters.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.bench.compared import (
    Comparison,
    at_edge,
    best_splits,
    compared,
    extent,
    records_of,
)
from sglang_elora.bench.figures import counted, medians, table
from sglang_elora.bench.intervals import ratios
from sglang_elora.bench.main_table import main_table
from sglang_elora.bench.over_base import is_base, over_base
from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.result import Result, by_block, by_side, peak_of, provenance, read
from sglang_elora.workloads import GROWS_AT, WORKLOADS

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


def summary(results: Sequence[Result], comparison: Comparison) -> str:
    """Tables of one workload: all sides, and ratios of ELORA's sides to stock's."""
    runs = by_side(results)
    lines = [table(_rows(runs))]
    for label, side in best_splits(runs).items():
        edge = " (at the edge of what was tried: a better one may lie beyond)"
        lines.append(f"{label}: {side}{edge if at_edge(side, runs) else ''}")
    for (ours, stock), found in comparison.items():
        figures_of = ", ".join(f"{name} {ratio.with_runs}" for name, ratio in found.items())
        lines.append(f"{ours} / {stock}: {figures_of}, {extent(results)}")
    return "\n".join(lines)


def across(comparisons: Mapping[str, Comparison]) -> str:
    """Mean of the workloads' ratios, for the pairs of sides that all workloads have."""
    found = list(comparisons.values())
    lines = [f"mean of the ratios of {', '.join(comparisons)}"]
    for pair in found[0]:
        if all(pair in ratios_of for ratios_of in found):
            means = (
                f"{name} {statistics.mean(ratios_of[pair][name].value for ratios_of in found):.3f}"
                for name in found[0][pair]
            )
            lines.append(f"{' / '.join(pair)}: {', '.join(means)}")
    return "\n".join(lines)


def relative(blocks: Mapping[str, Sequence[Result]], base: str) -> str:
    """Mean TTFT of each side relative to ``base``, by workload, and the mean over workloads.

    Ratios are over all runs that both sides have.
    """
    found: dict[str, dict[str, float]] = {}
    for name, results in blocks.items():
        runs = by_side(results)
        for side in runs:
            warm_up_s = max(result.warm_up_s for result in results)
            ratio = ratios(records_of(runs[side]), records_of(runs[base]), warm_up_s)
            if "ttft_mean_ms" in ratio:
                found.setdefault(side, {})[name] = ratio["ttft_mean_ms"].value
    rows = []
    for side, by_workload in found.items():
        cells = [by_workload.get(name) for name in blocks]
        known = [cell for cell in cells if cell is not None]
        cells.append(statistics.mean(known) if len(known) == len(blocks) else None)
        rows.append([side, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    return f"mean TTFT over that of {base}\n{plain_table(['', *blocks, 'mean'], rows)}"


def report(results: Sequence[Result]) -> str:
    """The main table, the tables of each workload and rate, and their mean."""
    blocks = by_block(results)
    comparisons = {name: compared(block) for name, block in blocks.items()}
    mixed = {name: block for name, block in blocks.items() if not is_base(block[0].workload)}
    over = {name: comparisons[name] for name in mixed}
    main = main_table(mixed, over)
    texts = [f"{name}\n{summary(block, comparisons[name])}" for name, block in blocks.items()]
    last = [across(over)] if len(over) > 1 else []
    first = [] if main is None else [str(main)]
    return "\n\n".join([*first, *texts, *last, *over_base(results)])


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
        records = [
            r for result in by_run.values() for r in counted(result.records, result.warm_up_s)
        ]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=float, help="seconds")
    parser.add_argument("--markdown", action="store_true", help="only the main table, in Markdown")
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
    print(f"{provenance(rows)}\n")
    results = [Result.from_row(row) for row in rows if "rise" not in row]
    if results and options.markdown:
        blocks = by_block(results)
        main = main_table(blocks, {name: compared(block) for name, block in blocks.items()})
        print("no side of ELORA, or none of stock" if main is None else main.markdown)
    elif results:
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
