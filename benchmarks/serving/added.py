"""Time that adapter loads add to TTFT, computed from rounds on three servers.

python -m benchmarks.serving.added FILE  # written by cold.py
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Round:
    """Mean TTFT of the same requests on each server, in milliseconds."""

    ours: float
    blocking: float
    free: float


@dataclass(frozen=True, slots=True)
class Added:
    """What loads add to mean TTFT, in milliseconds, and which share less that is than where they
    block, with the bounds of its 95% interval."""

    ours: float
    blocking: float
    less: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"a load adds {self.ours:.2f} ms to TTFT, {self.blocking:.2f} ms where it blocks: "
            f"{self.less:.1%} less ({self.low:.1%} to {self.high:.1%})"
        )


def added(rounds: Sequence[Round], seed: int = 0) -> Added:
    """Estimate with a percentile bootstrap over rounds (Efron and Tibshirani 1993, ch. 13)."""
    rng = random.Random(seed)
    resampled = sorted(_less(rng.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    low, high = resampled[round(0.025 * RESAMPLES)], resampled[round(0.975 * RESAMPLES) - 1]
    ours, blocking = _means(rounds)
    return Added(ours, blocking, _less(rounds), low, high)


def _means(rounds: Sequence[Round]) -> tuple[float, float]:
    ours = statistics.mean(found.ours - found.free for found in rounds)
    return ours, statistics.mean(found.blocking - found.free for found in rounds)


def _less(rounds: Sequence[Round]) -> float:
    ours, blocking = _means(rounds)
    return 1 - ours / blocking


def rounds_of(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Round]]:
    """Rounds by number of clients, from one row per request with side, round and clients."""
    ttft_ms: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in rows:
        by_side = ttft_ms.setdefault((row["clients"], row["round"]), {})
        kind = row["side"].partition("+")[2] or "ours"
        by_side.setdefault(kind, []).append(1e3 * (row["first_s"] - row["due_s"]))
    rounds: dict[int, list[Round]] = {}
    for (clients, _), by_side in ttft_ms.items():
        means = {kind: statistics.mean(found) for kind, found in by_side.items()}
        rounds.setdefault(clients, []).append(Round(**means))
    return rounds


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{clients} clients, TTFT {statistics.mean(found.free for found in rounds):.1f} ms without "
        f"loads: {added(rounds)}"
        for clients, rounds in rounds_of(rows).items()
    )


def main(path: Path) -> None:
    packed = path.read_bytes()
    text = gzip.decompress(packed) if path.suffix == ".gz" else packed
    _, *rows = map(json.loads, text.splitlines())
    print(report(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
