"""Tables of the results of h200.py.

python -m benchmarks.sim.tables benchmarks/results/sim/h200.jsonl [...] [--over-lru SIDE ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.bench.figures import cell
from sglang_elora.bench.plain_table import markdown_table

Row = Mapping[str, Any]
COLUMNS = (
    ("ttft_mean_ms", "mean TTFT ms"),
    ("ttft_p95_ms", "P95"),
    ("tpot_mean_ms", "TPOT ms"),
    ("cached_device", "device"),
    ("cached_host", "host"),
    ("cold", "cold"),
    ("adapter_loads", "loads"),
    ("hit_value_s", "hit value"),
)
TUNED = "stock-tuned:"


LRU, ORACLE = "elora:lru", "clairvoyant"


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """One row per side: the mean over seeds of each figure; ``seeds`` is their number."""
    by_side: dict[str, list[Row]] = {}
    for row in rows:
        by_side.setdefault(row["side"], []).append(row)
    figures = [key for key, _ in COLUMNS]
    return [
        {
            **mine[0],
            **{key: statistics.mean(row[key] for row in mine) for key in figures},
            "seeds": len({row["seed"] for row in mine}),
        }
        for mine in by_side.values()
    ]


def regret(row: Row, rows: Sequence[Row]) -> float | None:
    """``(x - oracle) / (lru - oracle)`` by mean TTFT: 0 is the clairvoyant side, 1 is LRU.

    None if one of them is missing, or LRU is within 1% of the clairvoyant side.
    """
    of = {other["side"]: float(other["ttft_mean_ms"]) for other in rows}
    if LRU not in of or ORACLE not in of or of[LRU] < 1.01 * of[ORACLE]:
        return None
    return (float(row["ttft_mean_ms"]) - of[ORACLE]) / (of[LRU] - of[ORACLE])


def best_splits(splits: Sequence[Row]) -> list[Row]:
    """The split with the lowest mean TTFT, of those with blocking and of those with overlapped
    loads."""
    kinds = {row["side"].partition("+")[2] for row in splits}
    by_kind = ([r for r in splits if r["side"].partition("+")[2] == kind] for kind in kinds)
    return [min(mine, key=lambda row: float(row["ttft_mean_ms"])) for mine in by_kind]


def table(rows: Sequence[Row]) -> str:
    """Of one model, workload and number of adapters, means over seeds. Hit value is over the
    clairvoyant one's; of static splits only the one with the lowest mean TTFT is shown."""
    rows = mean_rows(rows)
    splits = [row for row in rows if row["side"].startswith(TUNED)]
    best = best_splits(splits)
    shown = [row for row in rows if row not in splits or row in best]
    bound = next((r["hit_value_s"] for r in rows if r["side"] == ORACLE), None)
    lines = []
    for row in sorted(shown, key=lambda row: -float(row["ttft_mean_ms"])):
        cells = {**row, "hit_value_s": row["hit_value_s"] / bound if bound else None}
        label = f"best split ({row['side']})" if row in best else row["side"]
        left = regret(row, rows)
        shown_regret = "-" if left is None else f"{left:.2f}"
        lines.append([label, *(cell(cells[key]) for key, _ in COLUMNS), shown_regret])
    names = ["side", *(name for _, name in COLUMNS), "regret"]
    num_seeds = max((int(row["seeds"]) for row in rows), default=0)
    return f"Means of {num_seeds} seeds.\n\n{markdown_table(names, lines)}"


def over_lru(groups: Mapping[str, Sequence[Row]], sides: Sequence[str]) -> str:
    """Mean TTFT of each side over that of LRU, by seed in brackets, and its regret, per cell."""
    lines = []
    for name, rows in groups.items():
        means = {row["side"]: row for row in mean_rows(rows)}
        line = [name, cell(means[LRU]["ttft_mean_ms"])]
        for side in sides:
            if side not in means:
                line.append("-")
                continue
            left = regret(means[side], [*means.values()])
            ratio = means[side]["ttft_mean_ms"] / means[LRU]["ttft_mean_ms"]
            by_seed = ", ".join(f"{x:.2f}" for x in seed_ratios(rows, side, LRU))
            line.append(f"{ratio:.2f} ({by_seed}); {'-' if left is None else f'{left:.2f}'}")
        lines.append(line)
    return markdown_table(["cell", f"{LRU} ms", *sides], lines)


def seed_ratios(rows: Sequence[Row], side: str, other: str) -> list[float]:
    """Mean TTFT of one side over that of another, for each seed that both have."""
    of = {(row["side"], row["seed"]): float(row["ttft_mean_ms"]) for row in rows}
    seeds = sorted(seed for name, seed in of if name == side and (other, seed) in of)
    return [of[side, seed] / of[other, seed] for seed in seeds]


def sensitivity(rows: Sequence[Row]) -> str:
    """Mean TTFT of each side over that of the first one, with a constant halved and doubled."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    lines = []
    for case in dict.fromkeys((row["scaled"], row["factor"]) for row in rows):
        of = {r["side"]: r["ttft_mean_ms"] for r in rows if (r["scaled"], r["factor"]) == case}
        name = f"{case[0]} x {case[1]:g}" if case[0] else "as calibrated"
        ratios = (f"{of[side] / of[sides[0]]:.2f}" for side in sides[1:])
        lines.append([name, *ratios])
    table_of_ratios = markdown_table(["constant", *sides[1:]], lines)
    return f"mean TTFT over that of {sides[0]}\n\n{table_of_ratios}"


def peaks(rows: Sequence[Row]) -> str:
    """Table of peak rates in turns per second, by workload and side."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        of = {row["workload"]: row["peak_turns_per_s"] for row in rows if row["side"] == side}
        cells = (f"{of[w]:.1f}" if w in of else "-" for w in workloads)
        lines.append([side, *cells])
    return markdown_table(["side", *workloads], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument(
        "--over-lru", nargs="+", metavar="SIDE", help="one table: mean TTFT over that of elora:lru"
    )
    options = parser.parse_args()
    rows = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        is_peak = "peak_turns_per_s" in row
        key = (row["model"], "" if is_peak else row["workload"], f"{row['num_adapters']} adapters")
        groups.setdefault(key, []).append(row)
    if options.over_lru:
        print(over_lru({", ".join(k): v for k, v in groups.items()}, options.over_lru))
        return
    for names, mine in groups.items():
        if "peak_turns_per_s" in mine[0]:
            text = peaks(mine)
        elif any(row["scaled"] for row in mine):
            text = sensitivity(mine)
        else:
            text = table(mine)
        print(f"## {', '.join(filter(None, names))}\n\n{text}\n")


if __name__ == "__main__":
    main()
