"""Correctness and speed of the kernels on a GPU, in one call.

    python -m benchmarks.gpu.kernels --out OUT_DIR [--site SITE_DIR] [--budget-s 540] [--dry-run]

Parts, each written as soon as it is measured: facts and bandwidths, correctness on the device
(tests/kernels, if pytest is installed), CUDA graphs replayed with other adapters and experts,
page_copy, times, times of LoRA on experts, summary. SITE_DIR has SGLang for its kernels (bundle.sh,
unpacked). Runs in a bare checkout.
--dry-run runs everything on a CPU with tiny sizes, without times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
if "--site" in sys.argv:
    # The unpacked bundle is not installed; the checkout, in front, has its own ``tests``.
    sys.path.insert(1, sys.argv[sys.argv.index("--site") + 1])
import_module("benchmarks.kernels.shapes")  # makes sglang_elora importable in a bare checkout

import torch  # noqa: E402

from benchmarks.kernels import (  # noqa: E402
    bench_both,
    bench_lora_expand,
    bench_lora_logits,
    bench_lora_lookup,
    bench_lora_shrink,
    bench_page_copy,
    bench_routed_tiles,
    replay,
)
from benchmarks.kernels.expert_world import ExpertWorld  # noqa: E402
from benchmarks.kernels.floor import expand_work, shrink_work  # noqa: E402
from benchmarks.kernels.shapes import (  # noqa: E402
    MODULES,
    NUM_ADAPTERS,
    Case,
    cases,
    expert_cases,
)
from benchmarks.kernels.timing import Timer, bandwidths, facts, interleaved  # noqa: E402
from benchmarks.kernels.world import CaseWorld  # noqa: E402
from sglang_elora.pages import ModuleShape  # noqa: E402

TINY = (ModuleShape("qkv_proj", 128, (128, 64, 64)), ModuleShape("o_proj", 128, (96,)))
TINY_EXPERTS = (
    ModuleShape("gate_up_proj_moe", 64, (32, 32), 4),
    ModuleShape("down_proj_moe", 32, (64,), 4),
)


class Results:
    """Result files and remaining time of one run."""

    def __init__(self, out: Path, budget_s: float) -> None:
        self.out, self._end = out, time.monotonic() + budget_s
        out.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: Any) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self._end


def device_tests(log: Path, timeout_s: float) -> dict[str, Any]:
    """Result of tests/kernels on this device, run in their own process.

    pytest writes to ``log`` continuously, so that its output survives a time-out.
    """
    code = "import benchmarks.kernels.shapes, sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    folder = ROOT / "tests" / "kernels"
    command = [sys.executable, "-c", code, "-v", "-x", "-c", os.devnull, "--rootdir", str(folder)]
    command += ["--confcutdir", str(folder), "-p", "no:cacheprovider", str(folder)]
    for name in ("test_compile.py", "test_gpu_scripts.py", "test_gpu_stages.py"):  # for a CPU
        command += ["--ignore", str(folder / name)]
    path = os.pathsep.join([str(ROOT), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    passed = None
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s, env=env
            )
            passed = done.returncode == 0
        except subprocess.TimeoutExpired:
            output.write(f"\nnot done in {timeout_s} s\n")
    return {"passed": passed, "log": log.name, "output": log.read_text()[-4000:]}


def measure(case: Case, device: torch.device, rivals: bool) -> dict[str, Any]:
    """Times of all four modules of a case; with --dry-run each work runs once, untimed."""
    shapes = TINY if DRY_RUN else MODULES
    world = CaseWorld.build(case, device, shapes)
    if DRY_RUN:
        world.num_layers = 2
    row: dict[str, Any] = {"case": case.name, "layers_rotated": world.num_layers, "modules": {}}
    for shape in shapes:
        works, wrong = bench_both.works(world, shape, rivals)
        works |= bench_lora_shrink.works(world, shape) | bench_lora_expand.works(world, shape)
        bytes_of = {
            "shrink": shrink_work(case, shape).num_bytes,
            "expand": expand_work(case, shape).num_bytes,
        }
        bytes_of["both"] = sum(bytes_of.values())
        entry: dict[str, Any] = {"wrong": wrong, "bytes": bytes_of}
        if DRY_RUN:
            for work in works.values():
                work()
        else:
            timers = {name: Timer(work, world.num_layers) for name, work in works.items()}
            entry["times"] = interleaved(timers)
        row["modules"][shape.name] = entry
    del world
    tiny = {"hidden_size": 128, "num_tokens": 1000} if DRY_RUN else {}
    vocabulary = bench_lora_lookup.works(case, device, **tiny)
    vocabulary |= bench_lora_logits.works(case, device, **tiny)
    if DRY_RUN:
        for work in vocabulary.values():
            work()
    else:
        row["vocabulary"] = interleaved({name: Timer(work) for name, work in vocabulary.items()})
    return row


def measure_experts(case: Case, device: torch.device) -> dict[str, Any]:
    """Times of ``routed_tiles`` and of both modules of a layer of experts, as ``measure``."""
    tiny: dict[str, Any] = {"shapes": TINY_EXPERTS, "experts_per_row": 2, "max_rounds": 2}
    experts = ExpertWorld.build(case, device, **(tiny if DRY_RUN else {}))
    works, wrong = bench_routed_tiles.works(experts)
    row: dict[str, Any] = {
        "case": case.name,
        "routes": experts.num_routes,
        "rounds": len(experts.rounds),
        "wrong": wrong,
        "bytes": {shape.name: experts.num_bytes(shape) for shape in experts.shapes},
    }
    if DRY_RUN:
        for work in works.values():
            work()
    else:
        timers = {name: Timer(work, len(experts.rounds)) for name, work in works.items()}
        row["times"] = interleaved(timers)
    return row


def condensed(row: dict[str, Any], bytes_per_s: float) -> dict[str, Any]:
    """Summary of a case: medians summed over the modules, and ratios."""
    modules = row["modules"].values()
    names = next(iter(modules))["times"]
    totals = {name: sum(m["times"][name]["median_us"] for m in modules) for name in names}
    floors = {
        half: sum(m["bytes"][half] for m in modules) / bytes_per_s * 1e6
        for half in ("shrink", "expand", "both")
    }
    ours = totals["both/scattered"]
    return {
        "case": row["case"],
        "us": {name: round(value, 2) for name, value in totals.items()},
        "share_of_floor": {
            half: round(floors[half] / totals[f"{half}/scattered"], 3) for half in floors
        },
        "to_contiguous": round(ours / totals["both/contiguous"], 3),
        "to_rivals": {
            name[5:]: round(ours / totals[name], 3)
            for name in totals
            if name.startswith("both/") and name[5:] not in ("scattered", "contiguous")
        },
        "wrong": max(max(m["wrong"].values()) for m in modules),
    }


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases to time: those whose name starts with one of ``only``, or all."""
    if DRY_RUN:
        return [Case("decode", 3, 2, "mixed"), Case("prefill", 40, 1, "16")]
    return _named(cases(), only)


def _named(found: Iterable[Case], only: Sequence[str]) -> list[Case]:
    return [case for case in found if not only or case.name.startswith(tuple(only))]


def times(
    results: Results,
    device: torch.device,
    rivals: bool,
    bytes_per_s: float,
    only: Sequence[str] = (),
) -> list[Any]:
    rows, lines, left_out = [], [], []
    todo = chosen(only)
    for case in todo:
        if results.time_is_up:
            left_out.append(case.name)
            continue
        rows.append(measure(case, device, rivals))
        if not DRY_RUN:
            lines.append(condensed(rows[-1], bytes_per_s))
            print(json.dumps(lines[-1]), flush=True)
        results.write("times", {"rows": rows, "left_out": left_out})
    results.write("times", {"rows": rows, "left_out": left_out})
    return lines


def expert_times(
    results: Results, device: torch.device, bytes_per_s: float, only: Sequence[str] = ()
) -> list[Any]:
    """Medians in microseconds per layer, and the least that each module's bytes take."""
    rows, lines, left_out = [], [], []
    tiny = [Case("decode", 3, 2, "mixed"), Case("prefill", 20, 1, "16")]
    for case in tiny if DRY_RUN else _named(expert_cases(), only):
        if results.time_is_up:
            left_out.append(case.name)
            continue
        rows.append(row := measure_experts(case, device))
        if not DRY_RUN:
            medians = {name: round(t["median_us"], 2) for name, t in row["times"].items()}
            floors = {name: round(n / bytes_per_s * 1e6, 2) for name, n in row["bytes"].items()}
            lines.append({"case": case.name, "us": medians, "floor_us": floors})
            print(json.dumps(lines[-1]), flush=True)
        results.write("experts", {"rows": rows, "left_out": left_out})
    results.write("experts", {"rows": rows, "left_out": left_out})
    return lines


def targets(lines: list[Any], copies: list[Any], graphs: list[Any]) -> dict[str, Any]:
    """Measured values of the performance targets."""
    decode = [line for line in lines if line["case"].startswith("decode") and _rows_of(line) >= 64]
    mixed = [line for line in lines if line["case"].endswith("mixed")]
    loads = [row for row in copies if row["case"].startswith("load")]
    return {
        "to_contiguous_worst (<= 1.10)": max((x["to_contiguous"] for x in lines), default=None),
        "to_rivals_worst_mixed (< 1)": {
            name: max(x["to_rivals"][name] for x in mixed)
            for name in (mixed[0]["to_rivals"] if mixed else ())
        },
        "share_of_floor_worst_decode_64_up (>= 0.70)": {
            f"{n} adapters": min(
                (x["share_of_floor"]["both"] for x in decode if f"x{n}-" in x["case"]),
                default=None,
            )
            for n in NUM_ADAPTERS
        },
        "page_copy_share_of_link (>= 0.85)": {
            row["case"]: round(row["share_of_bandwidth"], 3) for row in loads
        },
        "graph_replay_right": all(
            row["wrong"] == 0 and row["untouched_rows_equal"] for row in graphs
        ),
        "wrong_elements_worst": max((x["wrong"] for x in lines), default=None),
    }


def _rows_of(line: dict[str, Any]) -> int:
    return int(line["case"].split("-")[1].split("x")[0])


def rightness(
    results: Results, device: torch.device, rates: dict[str, Any], tests_s: float
) -> tuple[list[Any], list[Any]]:
    """Rows of the graphs and of ``page_copy``, after the tests on the device."""
    if not DRY_RUN:
        tests = device_tests(results.out / "tests.log", tests_s)
        results.write("correctness", tests)
        print(tests["output"][-300:], flush=True)

    sizes: dict[str, Any] = {"shapes": TINY, "num_rows": 4} if DRY_RUN else {}
    graphs = replay.check(device, **sizes) + replay.check(device, tile_rows=64, **sizes)
    experts: dict[str, Any] = {"shapes": TINY_EXPERTS, "num_rows": 4, "experts_per_row": 2}
    graphs += replay.check_experts(device, **(experts if DRY_RUN else {}))
    results.write("graphs", graphs)
    print(json.dumps(graphs), flush=True)

    small: dict[str, Any] = {"shapes": TINY, "num_layers": 2, "ranks": (3,)} if DRY_RUN else {}
    pool = bench_page_copy.Pool(device, **small)
    copies: list[Any] = [{"case": "round trip", "right": bench_page_copy.check(pool)}]
    if DRY_RUN:
        for *_, work in bench_page_copy.cases(pool):
            work()
    else:
        copies += bench_page_copy.measure(pool, rates)
    del pool
    results.write("page_copy", copies)
    return graphs, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", type=Path, help="unpacked bundle with SGLang")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--parts", choices=("all", "times", "experts"), default="all")
    parser.add_argument("--only", nargs="+", default=(), help="starts of names of cases to time")
    options = parser.parse_args()
    if not DRY_RUN and not torch.cuda.is_available():
        print("needs a GPU (or --dry-run)")
        raise SystemExit(2)
    device = torch.device("cpu" if DRY_RUN else "cuda")
    results = Results(options.out, options.budget_s)

    rates = {} if DRY_RUN else bandwidths()
    try:
        import sglang.kernels.ops.lora.dense.chunked_sgmv_shrink  # noqa: F401

        rivals: Any = True
    except Exception as error:  # noqa: BLE001  whatever keeps it from importing is a fact of the run
        rivals = repr(error)
    results.write("facts", {**facts(), "seed": 0, "bandwidths": rates, "sglang_kernels": rivals})

    if options.parts == "all":
        graphs, copies = rightness(results, device, rates, options.budget_s / 3)
    bytes_per_s = rates["device"]["bytes_per_s"] if rates else 1.0
    if options.parts in ("all", "times"):
        lines = times(results, device, rivals is True and not DRY_RUN, bytes_per_s, options.only)
    if options.parts in ("all", "experts"):
        expert_lines = expert_times(results, device, bytes_per_s, options.only)
    if options.parts != "all":
        return
    summary = {
        "targets": targets(lines, copies[1:], graphs),
        "round_trip_right": copies[0]["right"],
        "cases": lines,
        "experts": expert_lines,
    }
    results.write("summary", summary)
    print(json.dumps(summary["targets"], indent=1))


if __name__ == "__main__":
    main()
