"""Measure stock SGLang and ELORA on the same traces at equal device bytes, or one running server.

    sglang-elora bench --quick
    sglang-elora bench --main --workloads chat --slots 8 --out DIR
    sglang-elora bench --runs 3 --duration 75 --out DIR
    sglang-elora bench --sides stock-tuned:8 stock-tuned:8+lpm stock-tuned:8+drain=0.5 --out DIR
    sglang-elora bench --url http://127.0.0.1:30000 --api openai

Without --url, the benchmark creates a checkpoint and adapters and starts the servers; the names of
--sides are explained in ``side_names``. Rows, tables, plots and the page report.html are written to
--out. The same command with the same --out continues a matrix that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sglang_elora.bench.calibrate import DEFAULT_GPU, GPUS, calibrate
from sglang_elora.bench.compared import TUNED
from sglang_elora.bench.endpoint import APIS, EndpointError
from sglang_elora.bench.figures import BARS, Bars
from sglang_elora.bench.machine import PACKAGES, commit, host_id
from sglang_elora.bench.matrix import Matrix, Plan, Row, Watcher, refuse_dirty
from sglang_elora.bench.page import page
from sglang_elora.bench.plots import save_plots
from sglang_elora.bench.report import peaks, report
from sglang_elora.bench.result import Result, provenance
from sglang_elora.bench.running import play_running
from sglang_elora.bench.servers import Bench, EmulatedLink
from sglang_elora.bench.sides import Sizes
from sglang_elora.bench.terminal import Terminal
from sglang_elora.testbed.server import ServerStartError
from sglang_elora.testbed.signals import sigterm_acts_as_ctrl_c
from sglang_elora.workloads import WORKLOADS

SIDES = ("stock-default", "stock-default+hicache", "elora:lru", "elora:elora")
SWEEP = (6, 8, 10)
"""Numbers of stock adapter slots to sweep, for rates at which stock is not overloaded. 8 was the
best split of most workloads."""
FAIR = "+grouped+overlap"  # a split with LoRA at our cost, and loads concurrent with batches
SWEPT = ("", FAIR)  # options of the swept splits
QUICK = Plan(
    workloads=("chat", "agent"),
    sides=("stock-default", f"{TUNED}8", f"{TUNED}8{FAIR}", "elora:elora"),
    runs=1,
    loads=(0.4, 0.7),
    duration_s=35.0,
    shares_servers=True,
    allow_dirty=True,
)
MAIN = Plan(workloads=tuple(WORKLOADS), sides=(), runs=5, duration_s=300.0)
"""The main table, with ``main_sides``: 33 minutes per workload and seed."""


def main_sides(slots: int) -> tuple[str, ...]:
    """Sides of the main table; each differs from the one before it in one thing, the last in the
    cache."""
    splits = (f"{TUNED}{slots}{options}" for options in ("", "+grouped", FAIR))
    return ("stock-default", "stock-default+hicache", *splits, "elora:elora")


VLLM_PYTHON = "BENCH_VLLM_PYTHON"
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
    preset = parser.add_mutually_exclusive_group().add_argument
    preset("--quick", action="store_true", help="chat and agent at two loads, one run: 12 minutes")
    preset("--main", action="store_true", help="six systems, five runs of 300 s: the main table")
    add("--slots", type=int, default=8, help="adapter slots of the splits of --main")
    add("--workloads", nargs="+", choices=WORKLOADS)
    add(
        "--sides",
        nargs="+",
        help="stock-default, stock-tuned:SLOTS, elora:POLICY, vllm:SLOTS; +options, @threads",
    )
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
    add("--together", type=int, help="servers that take turns; 1: one after the other")
    add("--slice", type=float, help="seconds of a turn")
    add("--ttft-ms", type=float, default=BARS.ttft_ms, help="bar of goodput and of --peak")
    add("--tpot-ms", type=float, default=BARS.tpot_ms, help="bar of goodput")
    add("--link", default="measure", help="a file of sglang_elora.bench.calibrate, or none")
    add("--gpu", choices=GPUS, default=DEFAULT_GPU, help="whose link is emulated")
    add("--link-threads", type=int, help="OpenMP threads of the calibration's server")
    add("--allow-other-link", action="store_true", help="a link calibrated on another machine")
    add("--allow-dirty", action="store_true", help="a tree with uncommitted changes")
    add("--stock-kv-tokens", type=int, default=Sizes().stock_kv_tokens)
    add("--layers", type=int, default=Sizes().num_layers, help="of the model")
    add("--variants", type=Path, help="the file with the plugins of sides elora:POLICY+VARIANT")
    add("--base-only", action="store_true", help="each trace once more, without adapters")
    add(
        "--vllm-python",
        type=Path,
        default=os.environ.get(VLLM_PYTHON),
        help=f"interpreter that sides vllm:SLOTS run in; by default from {VLLM_PYTHON}",
    )
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
    base = QUICK if options.quick else Plan(tuple(WORKLOADS), SIDES)
    if options.main:
        base = replace(MAIN, sides=main_sides(options.slots))
    swept: Sequence[int] = options.sweep_slots or ()
    if (
        options.sweep_slots is None
        and options.sides is None
        and not (options.quick or options.main)
    ):
        swept = SWEEP
    given = {
        "workloads": options.workloads,
        "sides": options.sides,
        "runs": options.runs,
        "loads": options.load,
        "duration_s": options.duration,
        "seed": options.seed,
        "num_adapters": options.adapters,
        "num_together": options.together,
        "slice_s": options.slice,
    }
    plan = replace(
        base,
        swept_sides=tuple(f"{TUNED}{slots}{option}" for option in SWEPT for slots in swept),
        bars=Bars(options.ttft_ms, options.tpot_ms),
        rise=tuple(options.peak_range) if options.peak else None,
        allow_dirty=options.allow_dirty or base.allow_dirty,
        allow_other_link=options.allow_other_link,
        base_only=options.base_only,
        **{name: value for name, value in given.items() if value is not None},
    )
    positive: Mapping[str, Sequence[float]] = {
        "--runs": (plan.runs,),
        "--load": plan.loads,
        "--duration": (plan.duration_s,),
        "--adapters": (plan.num_adapters,),
        "--together": (plan.num_together,),
        "--slice": (plan.slice_s,),
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
    if not plan.allow_dirty:
        refuse_dirty(commit())
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        terminal.progress(plan.num_servers) as watcher,
    ):
        link = _link(options, sizes, Path(folder), watcher)
        watcher.starts(f"making {plan.num_adapters} adapters")
        bench = Bench(
            Path(folder), plan.num_adapters, sizes, link, options.variants, options.vllm_python
        )
        rows = Matrix(bench, plan, options.out, watcher).play()
    print(f"measured in {time.perf_counter() - started_s:.0f} s")
    return rows


def _link(
    options: argparse.Namespace, sizes: Sizes, folder: Path, watcher: Watcher
) -> EmulatedLink | None:
    """The emulated link: of a file, or calibrated now, or earlier by a call that this continues."""
    if options.link == "none":
        return None
    if options.link != "measure":
        return EmulatedLink.load(Path(options.link))
    path = options.out / "calibration.json"
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    wanted = {
        "host": host_id(),
        "gpu": options.gpu,
        "num_layers": sizes.num_layers,
        "rounds": rounds,
        "threads": options.link_threads,
    }
    found = json.loads(path.read_text()) if path.exists() else {}
    if not all(found.get(name) == value for name, value in wanted.items()):
        watcher.starts("calibrating the emulated link")
        made = calibrate(sizes, folder, rounds, options.gpu, options.link_threads)
        path.write_text(json.dumps(made, indent=1) + "\n")
    return EmulatedLink.load(path)


def _conclude(rows: Sequence[Row], out: Path) -> int:
    """Write tables, plots and page; returns 1 if a request was not answered."""
    risen = [row for row in rows if "rise" in row]
    if risen:
        print(peaks(risen))
        return 0
    results = list(map(Result.from_row, rows))
    text = f"{provenance(rows)}\n\n{report(results)}"
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
    *("when", "host", "cpu", "python", *PACKAGES, "commit", "url", "api", "model"),
    *("num_adapters", "sizes", "link", "bars"),
)


if __name__ == "__main__":
    sys.exit(main())
