"""Simulation of all sides with the costs of H200s, with 20 to 1000 adapters.

    python -m benchmarks.sim.h200 table [--adapters 20 50 100 1000] [--model h200-8b] --out FILE
    python -m benchmarks.sim.h200 peak  [--adapters 100] ... --out FILE
    python -m benchmarks.sim.h200 sensitivity [--adapters 100] ... --out FILE

``table``: TTFT, TPOT, hit rates and hit value of each side at ``RATES``; static splits at several
shares. ``peak``: the highest rate with a mean TTFT below 500 ms, found by doubling and bisection.
``sensitivity``: mean TTFT with each constant of the calibration halved and doubled. One row per
result is appended to FILE; tables.py shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sglang_elora.bench.machine import machine
from sglang_elora.sim import Calibration, Record, kv_slots, make_engine
from sglang_elora.sim.calibration import SCALABLE
from sglang_elora.workloads import FULL_SIZE, Trace, adapter_name, make_trace

RATES = {
    "h200-8b": {"chat": 24.0, "translation": 40.0, "agent": 30.0},
    "h200-8b-32gb": {"chat": 8.0, "translation": 24.0, "agent": 12.0},
    "h200-70b": {"chat": 12.0, "translation": 20.0, "agent": 15.0},
}
"""Rates of the tables, in turns per second."""

OURS = ("elora:lru", "elora:elora_paper", "elora:elora", "elora:elora+sessions")
SIDES = ("stock-default", "slora", "chameleon", *OURS, "clairvoyant")
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)
"""Shares of the device bytes that adapter slots take in a static split."""

BAR_S = 0.5
WARM_UP = 0.2
GIVE_UP_ABOVE = 16.0  # times the table's rate


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    workload: str
    num_adapters: int
    side: str
    seed: int
    duration_s: float
    turns_per_s: float
    scaled: str = ""
    factor: float = 1.0

    def calibration(self) -> Calibration:
        found = Calibration.load(Path(__file__).parent / f"{self.model}.json")
        return found.scaled(self.scaled, self.factor) if self.scaled else found

    def trace(self) -> Trace:
        workload = replace(FULL_SIZE[self.workload], num_adapters=self.num_adapters)
        return make_trace(
            workload,
            turns_per_s=self.turns_per_s,
            duration_s=self.duration_s,
            seed=self.seed,
            with_tokens=False,
        )


def figures(case: Case) -> dict[str, Any]:
    """One run, played to its end."""
    calibration = case.calibration()
    names = [adapter_name(i) for i in range(case.num_adapters)]
    engine = make_engine(case.side, calibration, names)
    records = engine.play(case.trace())
    mine = [record for record in records if record.due_s >= WARM_UP * case.duration_s]
    ttft = sorted(record.ttft_s for record in mine)
    tpot = [(r.last_s - r.first_s) / (r.num_output - 1) for r in mine if r.num_output > 1]
    prompts = sum(record.num_prompt for record in mine)
    host = sum(record.num_from_host for record in mine)
    return {
        "requests": len(mine),
        "ttft_mean_ms": 1e3 * statistics.mean(ttft),
        "ttft_p95_ms": 1e3 * ttft[int(0.95 * len(ttft))],
        "tpot_mean_ms": 1e3 * statistics.mean(tpot),
        "cached_device": sum(r.num_cached - r.num_from_host for r in mine) / prompts,
        "cached_host": host / prompts,
        "cold": sum(record.was_cold for record in mine) / len(mine),
        "adapter_loads": engine.num_loads,
        "hit_value_s": hit_value_s(records, engine.slots_to_device, calibration),
    }


def hit_value_s(records: Iterable[Record], slots_to_device: int, calibration: Calibration) -> float:
    """Hit value of a run: seconds of prefill saved by cached KV, minus seconds of transfers."""
    saved_s = sum(calibration.prefill_s(record.num_cached, 0) for record in records)
    return saved_s - calibration.to_device_s(slots_to_device, 0)


def peak(case: Case) -> dict[str, Any]:
    """Turns per second up to which mean TTFT stays under the bar; 4 halvings, so within 5%."""

    def holds(factor: float) -> bool:
        rate = case.turns_per_s * factor
        return figures(replace(case, turns_per_s=rate))["ttft_mean_ms"] < 1e3 * BAR_S

    low, high = 0.25, 0.5
    while high <= GIVE_UP_ABOVE and holds(high):
        low, high = high, 2 * high
    for _ in range(4):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return {"peak_turns_per_s": low * case.turns_per_s}


def splits(calibration: Calibration, num_adapters: int, longest: int) -> list[str]:
    """Static splits at each share, without those that leave no room for a session."""
    counts = {
        min(num_adapters, round(share * calibration.pool_slots / calibration.split_slot))
        for share in SHARES
    }
    return [f"stock-tuned:{n}" for n in sorted(counts) if n and kv_slots(calibration, n) > longest]


def cases(options: argparse.Namespace, sides: Iterable[str]) -> Iterator[Case]:
    for workload in options.workloads:
        for count in options.adapters:
            for side in sides:
                rate = RATES[options.model][workload]
                yield Case(
                    options.model, workload, count, side, options.seed, options.duration, rate
                )


def with_splits(options: argparse.Namespace) -> Iterator[Case]:
    calibration = Calibration.load(Path(__file__).parent / f"{options.model}.json")
    for case in cases(options, ["stock-default"]):
        longest = FULL_SIZE[case.workload].max_tokens
        for side in splits(calibration, case.num_adapters, longest):
            yield replace(case, side=side)


def sensitivity(options: argparse.Namespace) -> Iterator[Case]:
    for case in cases(options, options.sides):
        yield case
        for name in SCALABLE:
            for factor in (0.5, 2.0):
                yield replace(case, scaled=name, factor=factor)


def run(found: Iterable[Case], measured: Callable[[Case], dict[str, Any]], out: Path) -> None:
    about = {"instrument": "simulated", **machine()}
    todo = list(found)
    with ProcessPoolExecutor(os.cpu_count()) as pool, out.open("a") as file:
        for case, figures_of in zip(todo, pool.map(measured, todo), strict=True):
            row = {**about, **asdict(case), **figures_of}
            file.write(json.dumps(row) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "peak", "sensitivity"])
    parser.add_argument("--model", choices=[*RATES], default="h200-8b")
    parser.add_argument("--workloads", nargs="+", choices=[*FULL_SIZE], default=[*FULL_SIZE])
    parser.add_argument("--adapters", nargs="+", type=int, default=[20, 50, 100, 1000])
    parser.add_argument("--sides", nargs="+", default=[*SIDES])
    parser.add_argument("--duration", type=float, default=300.0, help="seconds of trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    start = partial(run, out=options.out)
    if options.what == "sensitivity":
        start(sensitivity(options), figures)
    elif options.what == "peak":
        start(cases(options, options.sides), peak)
    else:
        start([*cases(options, options.sides), *with_splits(options)], figures)


if __name__ == "__main__":
    main()
