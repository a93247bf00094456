"""Simulation of conversations that five adapters check after each turn, with an H200 in 32 GB.

    python -m benchmarks.activated.simulated --seeds 0 1 2 --out FILE

The conversations are those of the base model. The sides hold the adapters as activated LoRAs
(``+activated``), as plain LoRAs, or answer the checks with the base model (``base:SIDE``). Rows
count the turns and, with names that begin with ``check_``, the checks. Requests due within the
first fifth of the trace, or the longest session's life, are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.sim.h200 import WARM_UP, Case, longest_life_s, of_records, run
from sglang_elora.sim import make_engine
from sglang_elora.workloads import CHECKS, Trace, adapter_name, make_trace

OF_BASE = "base:"
SIDES = (
    "stock-tuned:16+overlap",
    "stock-tuned:20+overlap",
    "stock-tuned:24+overlap",
    "elora:elora",
    "elora:lru+activated",
    "elora:elora+activated",
    f"{OF_BASE}elora:elora",
)


@dataclass(frozen=True, slots=True)
class Checked(Case):
    @property
    def counted_from_s(self) -> float:
        return max(WARM_UP * self.duration_s, longest_life_s(CHECKS))

    def trace(self) -> Trace:
        workload = replace(CHECKS, num_adapters=self.num_adapters)
        trace = make_trace(
            workload,
            turns_per_s=self.turns_per_s,
            duration_s=self.duration_s,
            seed=self.seed,
            with_tokens=False,
        )
        return trace.without_adapters() if self.side.startswith(OF_BASE) else trace


def measured(case: Case) -> Iterable[tuple[Case, dict[str, Any]]]:
    names = [adapter_name(i) for i in range(case.num_adapters)]
    engine = make_engine(case.side.removeprefix(OF_BASE), case.calibration(), names)
    records = [r for r in engine.play(case.trace()) if r.due_s >= case.counted_from_s]
    of_checks = of_records([record for record in records if record.is_check])
    yield (
        case,
        {
            **of_records([record for record in records if not record.is_check]),
            **{f"check_{name}": value for name, value in of_checks.items()},
            "adapter_loads": engine.num_loads,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--rate", type=float, default=4.0, help="turns per second")
    parser.add_argument("--duration", type=float, default=900.0, help="seconds of trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [
        Checked("h200-8b-32gb", "checks", 100, side, seed, options.duration, options.rate)
        for seed in options.seeds
        for side in options.sides
    ]
    run(cases, measured, options.out)


if __name__ == "__main__":
    main()
