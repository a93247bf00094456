"""The same traces on stock SGLang and on ELORA, with the same bytes on the device and on the host.

    python benchmarks/serving/run.py --workloads chat translation agent \\
        --sides stock-default stock-tuned:8 elora:lru elora:elora \\
        --runs 3 --duration 75 --link calibration.json --out DIR

Each (workload, run, side) has a fresh server; the sides of a run follow each other, and their order
rotates from run to run. A file per run holds all requests; report.py reads them. --sweep-slots
adds a stock-tuned side for each number of slots that leaves room for KV. With --peak the trace
becomes faster and faster, from --peak-range's first to its second factor, and what is asked for is
how far mean TTFT stays below --bar-ms.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/tree"))
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

from bench import Bench, EmulatedLink  # noqa: E402
from figures import table  # noqa: E402
from report import TUNED, Result, peak_of, report  # noqa: E402
from sides import Side, Sizes  # noqa: E402

from bench_radix_cache import machine  # noqa: E402
from sglang_elora.workloads import TURNS_PER_S, WORKLOADS, Rise, Trace, make_trace  # noqa: E402


class Runner:
    """Plays traces and writes what came of them to ``out``."""

    def __init__(self, bench: Bench, out: Path) -> None:
        self._bench = bench
        self._out = out
        self._facts = {**machine(), **bench.facts()}

    def run(self, side: Side, trace: Trace, number: int) -> Result:
        name = f"{trace.workload.name}-{side.name.replace(':', '_')}-{number}"
        row = self._row(side, trace, number, f"{name}.log")
        (self._out / f"{name}.json").write_text(json.dumps(row) + "\n")
        return Result.from_row(row)

    def find_peak(
        self, side: Side, trace: Trace, number: int, rise: Rise, bar_ms: float
    ) -> float | None:
        """The rate factor up to which mean TTFT stays under the bar, and a file of the run."""
        name = f"peak-{trace.workload.name}-{side.name.replace(':', '_')}-{number}"
        row = self._row(side, trace.rising(rise.low, rise.high), number, f"{name}.log")
        found = {"bar_ms": bar_ms, "rise": asdict(rise), **row}
        (self._out / f"{name}.json").write_text(json.dumps(found) + "\n")
        return peak_of(found)

    def _row(self, side: Side, trace: Trace, number: int, log_name: str) -> dict[str, Any]:
        log_path = self._out / "logs" / log_name
        played = self._bench.play(side, trace, log_path)
        return {
            **self._facts,
            "side": side.name,
            "flags": side.flags,
            "run": number,
            "trace": {**trace.facts(), "mean_live_kv_tokens": trace.mean_live_kv_tokens},
            "wall_s": played.wall_s,
            "elora_before": played.before,
            "elora_after": played.after,
            "records": [asdict(record) for record in played.records],
        }


def rotated(sides: list[Side], number: int) -> list[Side]:
    first = number % len(sides)
    return [*sides[first:], *sides[:first]]


def feasible(bench: Bench, names: list[str], swept: list[str], trace: Trace) -> list[Side]:
    """The sides, without the swept splits that leave no room for KV.

    Raises:
        ValueError: A side that was named itself does not fit.
    """
    sides = [bench.side(name, trace) for name in names]
    for name in swept:
        if name in names:
            continue
        try:
            sides.append(bench.side(name, trace))
        except ValueError as error:
            print(f"{name} left out: {error}", flush=True)
    return sides


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--sides", nargs="+", default=["stock-default", "elora:elora"])
    parser.add_argument("--sweep-slots", nargs="+", type=int, default=[])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--load", type=float, default=1.0, help="times workloads.TURNS_PER_S")
    parser.add_argument("--duration", type=float, default=75.0, help="seconds of trace")
    parser.add_argument("--seed", type=int, default=0, help="and number of the first run; then +1")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--stock-kv-tokens", type=int, default=Sizes().stock_kv_tokens)
    parser.add_argument("--layers", type=int, default=Sizes().num_layers, help="of the model")
    parser.add_argument("--link", type=Path, help="what calibrate.py wrote; no link without it")
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--bar-ms", type=float, default=500.0)
    parser.add_argument("--peak-range", type=float, nargs=2, default=[0.5, 5.0])
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    sizes = Sizes(options.stock_kv_tokens, num_layers=options.layers)
    link = None if options.link is None else EmulatedLink.load(options.link)
    swept = [f"{TUNED}{slots}" for slots in options.sweep_slots]
    results: list[Result] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        bench = Bench(Path(folder), options.adapters, sizes, link)
        runner = Runner(bench, options.out)
        for number in range(options.seed, options.seed + options.runs):
            for name in options.workloads:
                trace = make_trace(
                    replace(WORKLOADS[name], num_adapters=options.adapters),
                    turns_per_s=options.load * TURNS_PER_S[name],
                    duration_s=options.duration,
                    seed=number,
                )
                for side in rotated(feasible(bench, options.sides, swept, trace), number):
                    if options.peak:
                        rise = Rise(*options.peak_range, trace.duration_s)
                        factor = runner.find_peak(side, trace, number, rise, options.bar_ms)
                        print(f"{name} {side.name} {number}: peak factor {factor}", flush=True)
                        continue
                    results.append(runner.run(side, trace, number))
                    label = f"{name} {side.name} {number}"
                    print(table({label: results[-1].figures()}), flush=True)
    if results:
        print(f"\n{report(results)}")


if __name__ == "__main__":
    main()
