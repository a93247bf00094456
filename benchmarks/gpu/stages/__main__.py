"""Runs one stage of the checks on a borrowed GPU machine per call.

    python -m benchmarks.gpu.stages N --out OUT [--site SITE_DIR] [--dry-run] [--set NAME=VALUE ...]

N is 1 to 12 (``../TODO.md`` describes them). SITE_DIR is the unpacked bundle. After every step,
``stage-N.jsonl`` (a row per step) and ``stage-N.tar.gz`` (logs and details) are written to OUT.
Exits with status 1 if a check failed. --dry-run uses tiny sizes on a CPU; its figures are
meaningless.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.stages.stage_run import ROOT, Context, StageRun, Step, write_verdict

MODULES = {
    1: "first_launch",
    2: "kernels_right",
    3: "copies_right",
    4: "eager_server",
    5: "decode_graphs",
    6: "prefill_graphs",
    7: "announced_session",
    8: "sanitizer",
    9: "kernel_times",
    10: "workload",
    11: "expert_kernels",
    12: "expert_server",
}
ENV = {
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",  # the bundle's is older, built for torch 2.11
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}

DRY_RUN_PATIENCE = 3
"""Factor of the time-outs in a dry run: a loaded CPU machine is slower than the GPU's."""


def steps(stage: int) -> tuple[Step, ...]:
    found: tuple[Step, ...] = import_module(f"benchmarks.gpu.stages.{MODULES[stage]}").STEPS
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", type=int, choices=MODULES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", type=Path, help="folder with the unpacked bundle")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", dest="options")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def environment(options: argparse.Namespace, step: Step) -> dict[str, str]:
    """Variables of a step's process in addition to this process's."""
    paths = [str(options.site.resolve())] if options.site else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env = {**ENV, "PYTHONPATH": os.pathsep.join(paths)}
    if options.dry_run and step.interpreted:
        env["TRITON_INTERPRET"] = "1"
    return env


def run_step(options: argparse.Namespace) -> None:
    step = next(step for step in steps(options.stage) if step.name == options.step)
    context = Context(
        options.work / "kept",
        options.work / "models",
        options.dry_run,
        dict(option.split("=", 1) for option in options.options),
    )
    context.models.mkdir(exist_ok=True)
    write_verdict(context, step.name, step.run(context))


def run_stage(options: argparse.Namespace, work: Path) -> bool:
    command = [sys.executable, "-m", "benchmarks.gpu.stages", str(options.stage)]
    command += ["--out", str(options.out), "--work", str(work)]
    command += ["--dry-run"] if options.dry_run else []
    command += ["--set", *options.options] if options.options else []
    run = StageRun(f"stage-{options.stage}", options.out, work / "kept", command)
    for step in steps(options.stage):
        patience = DRY_RUN_PATIENCE if options.dry_run else 1
        step = replace(step, timeout_s=patience * step.timeout_s)
        run.play(step, environment(options, step))
    return run.report()


def main() -> None:
    options = parsed()
    if options.site:
        # The unpacked bundle is not installed; the checkout, in front, has its own ``tests``.
        sys.path.insert(1, str(options.site.resolve()))
    sys.path.append(str(ROOT / "python"))  # after the bundle, or an installed package
    if options.step:
        run_step(options)
        return
    with tempfile.TemporaryDirectory(prefix="stage-") as work:
        all_right = run_stage(options, Path(work))
    raise SystemExit(0 if all_right else 1)


if __name__ == "__main__":
    main()
