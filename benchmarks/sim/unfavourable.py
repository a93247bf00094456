"""Simulation of cases in which one pool gains little, with the costs of an H200 and 32 GB.

    python -m benchmarks.sim.unfavourable --out FILE

The cases of ``serving/unfavourable.py`` at full size. LoRA has the same cost on all sides here, so
that only the cache differs. ``one``: one adapter. ``fits``: eight adapters, as many adapter slots,
and chats that fit into the remaining KV pool. ``new``: no KV is reused. ``tiny``: a pool of 3.5
times the largest adapter. One row per result is appended to FILE.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.sim.h200 import Case, one, run
from sglang_elora.sim import Calibration
from sglang_elora.workloads import FULL_SIZE, Trace, Workload, make_trace

CHAT = FULL_SIZE["chat"]
OURS = ("elora:lru", "elora:elora", "elora:elora+sessions", "clairvoyant")


@dataclass(frozen=True, slots=True)
class Setting:
    workload: Workload
    turns_per_s: float
    sides: tuple[str, ...]
    pool_adapters: float | None = None  # size of the pool, if it is not that of 32 GB


SETTINGS: Mapping[str, Setting] = {
    "one": Setting(replace(CHAT, num_adapters=1), 8.0, ("stock-default", "stock-tuned:1")),
    "fits": Setting(replace(CHAT, num_adapters=8), 2.0, ("stock-default", "stock-tuned:8")),
    "new": Setting(
        replace(CHAT, system_tokens=(0, 0), turns=(1, 1), user_tokens=700.0, num_adapters=100),
        8.0,
        ("stock-default", "stock-tuned:22", "stock-tuned:30"),
    ),
    "tiny": Setting(
        replace(CHAT, max_tokens=2048, num_adapters=16),
        0.5,
        ("stock-tuned:1", "stock-tuned:2"),
        pool_adapters=3.5,
    ),
}


@dataclass(frozen=True, slots=True)
class Unfavourable(Case):
    def calibration(self) -> Calibration:
        found = Case.calibration(self)
        adapters = SETTINGS[self.workload].pool_adapters
        if adapters is None:
            return found
        return replace(found, pool_slots=round(adapters * found.split_slot))

    def trace(self) -> Trace:
        return make_trace(
            SETTINGS[self.workload].workload,
            turns_per_s=self.turns_per_s,
            duration_s=self.duration_s,
            seed=self.seed,
            with_tokens=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=900.0, help="seconds of trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [
        Unfavourable(
            "h200-8b-32gb",
            name,
            setting.workload.num_adapters,
            side,
            options.seed,
            options.duration,
            setting.turns_per_s,
        )
        for name, setting in SETTINGS.items()
        for side in (*setting.sides, *OURS)
    ]
    run(cases, one, options.out)


if __name__ == "__main__":
    main()
