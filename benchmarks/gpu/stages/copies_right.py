"""Stage 3: correctness of adapter copies while a batch runs, by ``copies.py``."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.gpu.stages.stage_run import Context, Step, Verdict

CHECKS = ("old_bytes_are_read", "layers_are_awaited")


def copies(context: Context) -> Verdict:
    command = [sys.executable, "-m", "benchmarks.gpu.copies", "--out", str(context.work)]
    command += ["--dry-run", "--rounds", "2"] if context.dry_run else []
    status = subprocess.run(command).returncode
    found = json.loads((context.work / "copies.json").read_text())
    right = {check: all(found[check]) for check in CHECKS}
    right["copies.py ends well"] = status == 0
    return Verdict(right, {"adapter_bytes": found["adapter_bytes"]})


STEPS = (Step("copies", 400, copies),)
