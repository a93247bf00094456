"""Stage 10: one workload of the matrix, two sides, by ``serve.py``.

Options: ``workload`` (chat), ``sides`` (``stock-default,elora:elora``), ``attention`` (triton).
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.gpu.stages.stage_run import Context, Step, Verdict


def serve(context: Context) -> Verdict:
    options = context.options
    sides = options.get("sides", "stock-default,elora:elora").split(",")
    command = [sys.executable, "-m", "benchmarks.gpu.serve", "--out", str(context.work)]
    command += ["--workloads", options.get("workload", "chat"), "--sides", *sides]
    command += ["--attention-backend", options.get("attention", "triton")]
    command += ["--dry-run", "--duration", "4"] if context.dry_run else []
    status = subprocess.run(command).returncode
    tables = context.work / "tables.txt"
    return Verdict({"both sides were measured": status == 0 and tables.exists()}, {"sides": sides})


STEPS = (Step("serve", 470, serve),)
