"""Tables of the results of h200.py.

python -m benchmarks.sim.tables benchmarks/results/sim/h200.jsonl [...]
"""

from __future__ import annotations

import argparse
import json
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


def table(rows: Sequence[Row]) -> str:
    """Of one model, workload and number of adapters. Hit value is over the clairvoyant one's; of
    static splits only the one with the lowest mean TTFT is shown."""
    splits = [row for row in rows if row["side"].startswith(TUNED)]
    best = min(splits, key=lambda row: float(row["ttft_mean_ms"]), default=None)
    shown = [row for row in rows if row not in splits or row is best]
    bound = next((r["hit_value_s"] for r in rows if r["side"] == "clairvoyant"), None)
    lines = []
    for row in sorted(shown, key=lambda row: -float(row["ttft_mean_ms"])):
        cells = {**row, "hit_value_s": row["hit_value_s"] / bound if bound else None}
        label = f"best split ({row['side']})" if row is best else row["side"]
        lines.append([label, *(cell(cells[key]) for key, _ in COLUMNS)])
    return markdown_table(["side", *(name for _, name in COLUMNS)], lines)


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
    options = parser.parse_args()
    rows = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        is_peak = "peak_turns_per_s" in row
        key = (row["model"], "" if is_peak else row["workload"], f"{row['num_adapters']} adapters")
        groups.setdefault(key, []).append(row)
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
