"""Stage 11: LoRA on experts by kernels alone: CUDA graphs of it, and its times.

A dry run measures no times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from typing import Any

from benchmarks.gpu.stages.stage_run import Context, Step, Verdict


def graphs(context: Context) -> Verdict:
    """Graphs of ``routed_tiles`` and both LoRA kernels, captured and replayed with each way to cut
    routes into tiles, at the shapes of Qwen3-30B-A3B."""
    import torch

    import_module("benchmarks.kernels.shapes")
    from sglang_elora.pages import ModuleShape

    replay = import_module("benchmarks.kernels.replay")
    device = torch.device("cpu" if context.dry_run else "cuda")
    shapes = (
        ModuleShape("gate_up_proj_moe", 64, (32, 32), 4),
        ModuleShape("down_proj_moe", 32, (64,), 4),
    )
    tiny: dict[str, Any] = {"shapes": shapes, "num_rows": 4, "experts_per_row": 2}
    rows = replay.check_experts(device, **(tiny if context.dry_run else {}))
    right = {
        f"{way}: graphs replayed with other adapters and experts are right": all(
            row["wrong"] == 0 and row["untouched_rows_equal"] for row in rows if row["way"] == way
        )
        for way in dict.fromkeys(row["way"] for row in rows)
    }
    return Verdict(right, {"rows": rows})


def times(context: Context) -> Verdict:
    """Every way to cut routes into tiles, 1 to 8,192 rows, 1 and 32 adapters, by ``kernels.py``."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--out", str(context.work)]
    command += ["--parts", "experts", "--budget-s", "290"]
    command += ["--dry-run"] if context.dry_run else []
    status = subprocess.run(command).returncode
    found = json.loads((context.work / "experts.json").read_text())
    wrong = [row["wrong"] for row in found["rows"]]
    right = {
        "kernels.py ends well": status == 0,
        "timed kernels are right": bool(wrong) and not any(max(w.values()) for w in wrong),
        "every case was timed": not found["left_out"],
    }
    return Verdict(right, {"cases": [row["case"] for row in found["rows"]]})


STEPS = (
    Step("graphs", 150, graphs, interpreted=True),
    Step("times", 330, times, interpreted=True),
)
