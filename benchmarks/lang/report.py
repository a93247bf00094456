"""Tables of the measurements of three_steps.py.

Run it by ``python -m benchmarks.lang.report FILE...``.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("program", "arrival", "none")
DRAWS = 4_000  # of the bootstrap


def saved_ms(rows: Sequence[dict[str, Any]], way: str) -> list[float]:
    """Milliseconds saved in each round, relative to the program without hints."""
    none = {row["round"]: row["total_s"] for row in rows if row["way"] == "none"}
    return [1e3 * (none[row["round"]] - row["total_s"]) for row in rows if row["way"] == way]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[round(0.025 * DRAWS)], medians[round(0.975 * DRAWS)]


def table(path: Path) -> str:
    facts, *rows = map(json.loads, path.read_text().splitlines())
    lines = [
        f"{path.name}: commit {facts['commit']}, {facts['cpu']}",
        "",
        "| clients | way | programs | median | mean | step 1 | 2 | 3 | saved, median (95%) |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for clients in sorted({row["clients"] for row in rows}):
        beside = [row for row in rows if row["clients"] == clients]
        for way in WAYS:
            found = [row for row in beside if row["way"] == way]
            total_ms = [1e3 * row["total_s"] for row in found]
            steps = (statistics.median(1e3 * row["step_s"][i] for row in found) for i in range(3))
            saved = saved_ms(beside, way)
            low, high = interval(saved)
            lines.append(
                f"| {clients} | {way} | {len(found)} | {statistics.median(total_ms):.0f} ms "
                f"| {statistics.mean(total_ms):.0f} | "
                + " | ".join(f"{step:.0f}" for step in steps)
                + (
                    " | |"
                    if way == "none"
                    else f" | {statistics.median(saved):.0f} ({low:.0f} to {high:.0f}) |"
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
