"""Simulation of all sides with the costs of H200s and other GPUs, with 20 to 1000 adapters.

    python -m benchmarks.sim.h200 table [--adapters 20 50 100 1000] [--model h200-8b] --out FILE
    python -m benchmarks.sim.h200 splits [--adapters 100 1000] ... --out FILE
    python -m benchmarks.sim.h200 peak  [--adapters 100] ... --out FILE
    python -m benchmarks.sim.h200 sensitivity [--adapters 100] ... --out FILE

``table``: TTFT, TPOT, hit rates and hit value of each side at ``RATES``. ``splits``: the same of
static splits, swept until the best number of slots lies inside the range. ``peak``: the highest
rate with a mean TTFT below 500 ms, found by doubling and bisection. ``sensitivity``: mean TTFT with
each constant of the calibration halved and doubled. One row per result is appended to FILE;
tables.py shows them. Requests due within the first session's life are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sglang_elora.bench.machine import machine
from sglang_elora.sim import Calibration, Record, make_engine
from sglang_elora.sim.calibration import SCALABLE
from sglang_elora.workloads import FULL_SIZE, Trace, Workload, adapter_name, make_trace
from sglang_elora.workloads.trace import NOMINAL_ANSWER_S

RATES = {
    "h200-8b": {"chat": 24.0, "translation": 40.0, "agent": 30.0},
    "h200-8b-32gb": {"chat": 8.0, "translation": 24.0, "agent": 12.0},
    "h200-70b": {"chat": 12.0, "translation": 20.0, "agent": 15.0},
    "h100-8b": {"chat": 20.0, "translation": 36.0, "agent": 26.0},
    "a10-8b": {"chat": 0.6, "translation": 1.6, "agent": 1.2},
    "l4-8b": {"chat": 0.35, "translation": 1.0, "agent": 0.8},
}
"""Rates of the tables, in turns per second."""

OURS = ("elora:lru", "elora:elora_paper", "elora:elora", "elora:elora+sessions")
LADDER = ("clairvoyant:adapters", "clairvoyant:device", "clairvoyant:host")
SIDES = ("stock-default", "slora", "chameleon", *OURS, "clairvoyant", "clairvoyant+hints")
"""Sides of ``table`` unless others are given. Also known: ``unlimited`` and those of ``LADDER``."""

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the device bytes that adapter slots take in the static splits of a sweep's start."""

REFINED_TO = 0.08
"""A sweep ends when the neighbours of its best split differ from it by at most this share."""

BAR_S = 0.5
WARM_UP = 0.2
"""Share of the duration that is not counted at its start; a session's longest life at least."""

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

    @property
    def counted_from_s(self) -> float:
        """Requests due before it are not counted."""
        workload = FULL_SIZE.get(self.workload)
        return max(WARM_UP * self.duration_s, 0.0 if workload is None else longest_life_s(workload))

    def trace(self) -> Trace:
        workload = replace(FULL_SIZE[self.workload], num_adapters=self.num_adapters)
        return make_trace(
            workload,
            turns_per_s=self.turns_per_s,
            duration_s=self.duration_s,
            seed=self.seed,
            with_tokens=False,
        )


def longest_life_s(workload: Workload) -> float:
    """Mean seconds from the first turn to the last of a session with the most turns."""
    return workload.turns[1] * (workload.think_s + NOMINAL_ANSWER_S)


def figures(case: Case) -> dict[str, Any]:
    """One run, played to its end."""
    calibration = case.calibration()
    names = [adapter_name(i) for i in range(case.num_adapters)]
    engine = make_engine(case.side, calibration, names)
    records = engine.play(case.trace())
    mine = [record for record in records if record.due_s >= case.counted_from_s]
    tpot = [(r.last_s - r.first_s) / (r.num_output - 1) for r in mine if r.num_output > 1]
    return {
        **of_records(mine),
        "tpot_mean_ms": 1e3 * statistics.mean(tpot),
        "adapter_loads": engine.num_loads,
        "hit_value_s": hit_value_s(records, engine.slots_to_device, calibration),
    }


def of_records(records: Sequence[Record]) -> dict[str, float]:
    """Figures of any simulated requests."""
    ttft = sorted(record.ttft_s for record in records)
    prompts = sum(record.num_prompt for record in records)
    cached = sum(record.num_cached for record in records)
    host = sum(record.num_from_host for record in records)
    return {
        "requests": len(records),
        "ttft_mean_ms": 1e3 * statistics.mean(ttft),
        "ttft_p95_ms": 1e3 * ttft[int(0.95 * len(ttft))],
        "ttft_p99_ms": 1e3 * ttft[int(0.99 * len(ttft))],
        "cached_device": (cached - host) / prompts,
        "cached_host": host / prompts,
        "computed_tokens": (prompts - cached) / len(records),
        "cold": sum(record.was_cold for record in records) / len(records),
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


def sweep(case: Case, shares: Sequence[float] = SHARES) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Static splits of one case, until the best by mean TTFT lies between two that are close.

    The range ends where a slot for each adapter, or too little room for a session, ends it.

    Args:
        case: Its side is what follows the number of slots: nothing, or ``+overlap``.
        shares: Shares of the device bytes to begin with. Overloaded splits take long to simulate.
    """
    calibration = case.calibration()
    longest = FULL_SIZE[case.workload].max_tokens
    most = (calibration.pool_slots - longest - 1) // calibration.split_slot
    most = min(case.num_adapters, most)
    unit = calibration.pool_slots / calibration.split_slot
    todo = sorted({min(most, max(1, round(share * unit))) for share in shares})
    found: dict[int, float] = {}
    while todo:
        for count in todo:
            split = replace(case, side=f"stock-tuned:{count}{case.side}")
            measured = figures(split)
            found[count] = measured["ttft_mean_ms"]
            yield split, measured
        todo = next_splits(found, most)


def next_splits(found: Mapping[int, float], most: int) -> list[int]:
    """The numbers of slots that a sweep tries next; none if its best is enclosed closely.

    Args:
        found: Mean TTFT by number of slots.
        most: Most slots that a split can have.
    """
    counts = sorted(found)
    best = min(counts, key=lambda count: (found[count], count))
    place = counts.index(best)
    gap = max(1, round(REFINED_TO * best))
    below = counts[place - 1] if place else 0
    above = counts[place + 1] if place + 1 < len(counts) else most + 1
    ends = [(below + best) // 2] if best - below > gap else []
    if above - best > gap:
        ends.append((best + above) // 2)
    return [count for count in ends if 1 <= count <= most and count not in found]


def cases(options: argparse.Namespace, sides: Iterable[str]) -> Iterator[Case]:
    for workload in options.workloads:
        rate = RATES[options.model][workload] * options.load
        for count in options.adapters:
            for seed in options.seeds:
                for side in sides:
                    yield Case(options.model, workload, count, side, seed, options.duration, rate)


def sensitivity(options: argparse.Namespace) -> Iterator[Case]:
    for case in cases(options, options.sides):
        yield case
        for name in SCALABLE:
            for factor in (0.5, 2.0):
                yield replace(case, scaled=name, factor=factor)


def run(
    found: Iterable[Case],
    measured: Callable[[Case], Iterable[tuple[Case, dict[str, Any]]]],
    out: Path,
    jobs: int | None = None,
) -> None:
    """Measure cases in parallel and append their rows to a file.

    Args:
        jobs: Processes; None for one per CPU.
    """
    about = {"instrument": "simulated", **machine()}
    with out.open("a") as file:

        def write(begun_s: float, rows: Iterable[tuple[Case, dict[str, Any]]]) -> None:
            begun_at = datetime.fromtimestamp(begun_s, UTC).isoformat(timespec="seconds")
            for case, figures_of in rows:
                row = {**about, "begun_at": begun_at, **asdict(case), **figures_of}
                file.write(json.dumps(row) + "\n")
            file.flush()

        if jobs == 1:
            for case in found:
                write(time.time(), measured(case))
            return
        todo = list(found)
        with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
            for begun_s, rows in pool.map(partial(_begun, measured), todo):
                write(begun_s, rows)


def _begun(
    measured: Callable[[Case], Iterable[tuple[Case, dict[str, Any]]]], case: Case
) -> tuple[float, list[tuple[Case, dict[str, Any]]]]:
    return time.time(), list(measured(case))


def one(case: Case) -> Iterable[tuple[Case, dict[str, Any]]]:
    yield case, figures(case)


def one_peak(case: Case) -> Iterable[tuple[Case, dict[str, Any]]]:
    yield case, peak(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "splits", "peak", "sensitivity"])
    parser.add_argument("--model", choices=[*RATES], default="h200-8b")
    parser.add_argument("--workloads", nargs="+", choices=[*FULL_SIZE], default=[*FULL_SIZE])
    parser.add_argument("--adapters", nargs="+", type=int, default=[20, 50, 100, 1000])
    parser.add_argument("--sides", nargs="+", default=[*SIDES])
    parser.add_argument("--duration", type=float, default=900.0, help="seconds of trace")
    parser.add_argument("--load", type=float, default=1.0, help="times the rates of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--overlap", action="store_true", help="splits load concurrently with batches"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[*SHARES], help="of splits")
    parser.add_argument("--jobs", type=int, help="processes; one per CPU unless given")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    start = partial(run, out=options.out, jobs=options.jobs)
    if options.what == "sensitivity":
        start(sensitivity(options), one)
    elif options.what == "peak":
        start(cases(options, options.sides), one_peak)
    elif options.what == "splits":
        start(
            cases(options, ["+overlap" if options.overlap else ""]),
            partial(sweep, shares=options.shares),
        )
    else:
        start(cases(options, options.sides), one)


if __name__ == "__main__":
    main()
