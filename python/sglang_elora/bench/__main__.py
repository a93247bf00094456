"""Measure stock SGLang and ELORA on the same traces at equal device bytes, or one running server.

    sglang-elora bench --quick
    sglang-elora bench --runs 3 --duration 75 --out DIR
    sglang-elora bench --url http://127.0.0.1:30000 --api openai

Without --url, the benchmark creates a checkpoint and adapters and starts the servers. Rows, tables,
plots and the page report.html are written to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sglang_elora.bench.calibrate import calibrate
from sglang_elora.bench.endpoint import APIS, EndpointError
from sglang_elora.bench.figures import BARS, Bars
from sglang_elora.bench.machine import PACKAGES
from sglang_elora.bench.matrix import Matrix, Plan, Row
from sglang_elora.bench.page import page
from sglang_elora.bench.plots import save_plots
from sglang_elora.bench.report import TUNED, peaks, report
from sglang_elora.bench.result import Result
from sglang_elora.bench.running import play_running
from sglang_elora.bench.servers import Bench, EmulatedLink
from sglang_elora.bench.sides import Sizes
from sglang_elora.bench.terminal import Terminal
from sglang_elora.testbed.server import ServerStartError
from sglang_elora.testbed.signals import sigterm_acts_as_ctrl_c
from sglang_elora.workloads import WORKLOADS

SIDES = ("stock-default", "elora:lru", "elora:elora")
SWEEP = (6, 8, 10)
QUICK_SIDES = ("stock-default", f"{TUNED}8", "elora:elora")
QUICK = Plan(
    workloads=("chat", "agent"),
    sides=QUICK_SIDES,
    runs=1,
    loads=(0.4, 0.7),
    duration_s=35.0,
    shares_servers=True,
)
"""Numbers of stock adapter slots to sweep, for rates at which stock is not overloaded. 8 was the
best split of most workloads."""

QUICK_ROUNDS = 3  # rounds of calibration with --quick
ROUNDS = 9


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    terminal = Terminal()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with sigterm_acts_as_ctrl_c():
            rows = _running(options, terminal) if options.url else _matrix(options, terminal)
    except KeyboardInterrupt:
        return 130
    except (EndpointError, ServerStartError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return _conclude(rows, options.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sglang-elora bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="chat and agent at two loads, one run")
    add("--workloads", nargs="+", choices=WORKLOADS)
    add("--sides", nargs="+", help="stock-default, stock-tuned:SLOTS, elora:POLICY")
    add(
        "--sweep-slots",
        nargs="*",
        type=int,
        help="sides stock-tuned:SLOTS, where they fit",
    )
    add("--runs", type=int)
    add("--load", nargs="+", type=float, help="times the workload's rate (workloads.TURNS_PER_S)")
    add("--duration", type=float, help="seconds of trace")
    add("--seed", type=int, default=0, help="and number of the first run; then +1")
    add("--adapters", type=int, default=64)
    add("--ttft-ms", type=float, default=BARS.ttft_ms, help="bar of goodput and of --peak")
    add("--tpot-ms", type=float, default=BARS.tpot_ms, help="bar of goodput")
    add("--link", default="measure", help="a file of sglang_elora.bench.calibrate, or none")
    add("--stock-kv-tokens", type=int, default=Sizes().stock_kv_tokens)
    add("--layers", type=int, default=Sizes().num_layers, help="of the model")
    add("--variants", type=Path, help="the file with the plugins of sides elora:POLICY+VARIANT")
    add("--peak", action="store_true", help="up to which rate is mean TTFT under its bar?")
    add("--peak-range", type=float, nargs=2, default=[0.5, 5.0], help="rate factors of that trace")
    add("--url", help="measure this server instead")
    add("--api", choices=APIS, default="openai")
    add("--model", help="with --url: as the server calls it")
    add("--adapter-names", nargs="*", help="with --url: all it has by default; nothing for none")
    add("--out", type=Path, default=Path(".bench"))
    return parser.parse_args(argv)


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan from the options, with defaults of the quick or of the full plan.

    Raises:
        ValueError: A number that must be positive is not.
    """
    swept: Sequence[int] = options.sweep_slots or ()
    if options.sweep_slots is None and options.sides is None and not options.quick:
        swept = SWEEP
    base = QUICK if options.quick else Plan(tuple(WORKLOADS), SIDES)
    given = {
        "workloads": options.workloads,
        "sides": options.sides,
        "runs": options.runs,
        "loads": options.load,
        "duration_s": options.duration,
        "seed": options.seed,
        "num_adapters": options.adapters,
    }
    plan = replace(
        base,
        swept_sides=tuple(f"{TUNED}{slots}" for slots in swept),
        bars=Bars(options.ttft_ms, options.tpot_ms),
        rise=tuple(options.peak_range) if options.peak else None,
        **{name: value for name, value in given.items() if value is not None},
    )
    positive: Mapping[str, Sequence[float]] = {
        "--runs": (plan.runs,),
        "--load": plan.loads,
        "--duration": (plan.duration_s,),
        "--adapters": (plan.num_adapters,),
    }
    for name, values in positive.items():
        if not all(value > 0 for value in values):
            raise ValueError(f"{name} must be positive, got {' '.join(map(str, values))}")
    return plan


def _running(options: argparse.Namespace, terminal: Terminal) -> list[Row]:
    plan = plan_of(options)
    with terminal.progress(plan.runs * len(plan.workloads)) as watcher:
        return play_running(
            (options.url.rstrip("/"), options.api, options.model, options.adapter_names),
            plan,
            options.out,
            watcher,
        )


def _matrix(options: argparse.Namespace, terminal: Terminal) -> list[Row]:
    plan, sizes = plan_of(options), Sizes(options.stock_kv_tokens, num_layers=options.layers)
    started_s = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        terminal.progress(plan.num_servers) as watcher,
    ):
        link = None
        if options.link == "measure":
            watcher.starts("calibrating the emulated link")
            rounds = QUICK_ROUNDS if options.quick else ROUNDS
            path = options.out / "calibration.json"
            path.write_text(json.dumps(calibrate(sizes, Path(folder), rounds), indent=1) + "\n")
            link = EmulatedLink.load(path)
        elif options.link != "none":
            link = EmulatedLink.load(Path(options.link))
        watcher.starts(f"making {plan.num_adapters} adapters")
        bench = Bench(Path(folder), plan.num_adapters, sizes, link, options.variants)
        rows = Matrix(bench, plan, options.out, watcher).play()
    print(f"measured in {time.perf_counter() - started_s:.0f} s")
    return rows


def _conclude(rows: Sequence[Row], out: Path) -> int:
    """Write tables, plots and page; returns 1 if a request was not answered."""
    risen = [row for row in rows if "rise" in row]
    if risen:
        print(peaks(risen))
        return 0
    results = list(map(Result.from_row, rows))
    text = report(results)
    (out / "tables.txt").write_text(f"{text}\n")
    facts = {name: rows[0][name] for name in _FACTS if name in rows[0]}
    plots = save_plots(results, out)
    path = out / "report.html"
    path.write_text(page("sglang-elora bench", results, facts, plots))
    print(f"{text}\n\nfiles, tables, plots: {out}\nreport: {path}")
    errors = [r.error for result in results for r in result.records if r.error is not None]
    if errors:
        print(f"{len(errors)} requests failed, the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


_FACTS = (
    *("when", "cpu", "python", *PACKAGES, "commit", "url", "api", "model"),
    *("num_adapters", "sizes", "link", "bars"),
)


if __name__ == "__main__":
    sys.exit(main())
