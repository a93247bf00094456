"""Comparison of the simulator with the real CPU server: cache hits and TTFT on the same traces.

    python benchmarks/results/rows.py unpack serving
    python -m benchmarks.sim.validate [--folders load-1 load-0.7] [--out FILE]

Per workload and side, means over the runs of results/serving: prompt tokens found on the device and
on the host, and mean TTFT. Below each workload, the order of the sides by mean TTFT, on the server
and in the simulator. Only requests that the real server answered after the warm-up count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.sim.fit import read, runs
from sglang_elora.bench.figures import WARM_UP
from sglang_elora.bench.machine import machine
from sglang_elora.sim import Calibration, make_engine
from sglang_elora.workloads import WORKLOADS, Trace, adapter_name, make_trace


@dataclass(frozen=True, slots=True)
class Found:
    device: float  # share of the prompts' tokens
    host: float
    ttft_s: float  # mean

    @classmethod
    def of(cls, records: Sequence[Any], duration_s: float) -> Found:
        mine = [r for r in records if r.due_s >= WARM_UP * duration_s and r.ttft_s is not None]
        prompts = sum(r.num_prompt for r in mine)
        host = sum(r.num_from_host for r in mine)
        cached = sum(r.num_cached for r in mine)
        ttft_s = statistics.mean(r.ttft_s for r in mine)
        return cls((cached - host) / prompts, host / prompts, ttft_s)

    @classmethod
    def mean(cls, found: Sequence[Found]) -> Found:
        columns = ([getattr(f, name) for f in found] for name in cls.__slots__)
        return cls(*map(statistics.mean, columns))


def trace_of(row: dict[str, Any]) -> Trace:
    about = row["trace"]
    workload = WORKLOADS[about["workload"]["name"]]
    return make_trace(
        replace(workload, num_adapters=row["num_adapters"]),
        turns_per_s=about["turns_per_s"],
        duration_s=about["duration_s"],
        seed=about["seed"],
    )


def compare(row: dict[str, Any], calibration: Calibration) -> tuple[Found, Found]:
    """(real, simulated) of one run.

    Raises:
        ValueError: The trace is not the one that was played.
    """
    trace = trace_of(row)
    names = [adapter_name(i) for i in range(row["num_adapters"])]
    simulated = make_engine(row["side"], calibration, names).play(trace)
    prompts = {(r.session, r.turn): r.num_prompt for r in simulated}
    for record in row["records"]:
        if record.num_prompt != prompts.get(record.key, record.num_prompt):
            raise ValueError(f"request {record.key} is {record.num_prompt} tokens long in the run")
    real = [record for record in row["records"] if record.error is None]
    return tuple(Found.of(records, trace.duration_s) for records in (real, simulated))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", nargs="+", default=["load-1", "load-0.7"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    here = Path(__file__).parent
    ours, stock = (Calibration.load(here / f"{name}.json") for name in ("cpu", "cpu-stock"))
    rows, about = [], machine()
    for folder in options.folders:
        found: dict[str, dict[str, list[tuple[Found, Found]]]] = {}
        for path in runs([f"{folder}/*.json.gz"]):
            row = read(path)
            workload, side = row["trace"]["workload"]["name"], row["side"]
            pair = compare(row, stock if side.startswith("stock") else ours)
            found.setdefault(workload, {}).setdefault(side, []).append(pair)
            rows.append(
                {
                    "instrument": "simulated, beside the real CPU server",
                    **about,
                    "folder": folder,
                    "workload": workload,
                    "side": side,
                    "seed": row["run"],
                    "real": {name: getattr(pair[0], name) for name in Found.__slots__},
                    "simulated": {name: getattr(pair[1], name) for name in Found.__slots__},
                }
            )
        for workload, sides in found.items():
            print(_table(f"{folder} {workload}", sides))
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(title: str, sides: dict[str, list[tuple[Found, Found]]]) -> str:
    means = {
        side: tuple(map(Found.mean, zip(*pairs, strict=True))) for side, pairs in sides.items()
    }
    lines = [f"{title}: real / simulated", f"{'':22}{'device':>16}{'host':>16}{'TTFT ms':>16}"]
    for side, (real, simulated) in means.items():
        cells = (
            f"{real.device:.3f} / {simulated.device:.3f}",
            f"{real.host:.3f} / {simulated.host:.3f}",
            f"{1e3 * real.ttft_s:.0f} / {1e3 * simulated.ttft_s:.0f}",
        )
        lines.append(f"{side:22}" + "".join(f"{cell:>16}" for cell in cells))
    for i, name in enumerate(("real", "simulated")):
        lines.append(f"  {name}: " + " < ".join(sorted(means, key=lambda s: means[s][i].ttft_s)))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
