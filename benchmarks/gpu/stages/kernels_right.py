"""Stage 2: the kernels compared with their references, also in graphs replayed with other
adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

from benchmarks.gpu.stages.stage_run import ROOT, Context, Step, Verdict

TESTS_S = 240


def tiny(context: Context) -> dict[str, Any]:
    from sglang_elora.pages import ModuleShape

    shapes = (ModuleShape("qkv_proj", 128, (128, 64, 64)), ModuleShape("o_proj", 128, (96,)))
    return {"shapes": shapes} if context.dry_run else {}


def graphs(context: Context) -> Verdict:
    """Graphs of decode and prefill tiles, at the shapes of Llama-3-8B."""
    import torch

    import_module("benchmarks.kernels.shapes")
    replay = import_module("benchmarks.kernels.replay")
    device = torch.device("cpu" if context.dry_run else "cuda")
    sizes: dict[str, Any] = {"num_rows": 4, **tiny(context)} if context.dry_run else {}
    rows = replay.check(device, **sizes) + replay.check(device, tile_rows=64, **sizes)
    right = {
        "graphs replayed with other adapters are right": all(row["wrong"] == 0 for row in rows),
        "rows without an adapter stay as they are": all(
            row["untouched_rows_equal"] for row in rows
        ),
    }
    return Verdict(right, {"rows": rows})


def page_copy(context: Context) -> Verdict:
    """Adapters of rank 16 and 64, written to scattered slots of all layers and read back."""
    import torch

    import_module("benchmarks.kernels.shapes")
    bench = import_module("benchmarks.kernels.bench_page_copy")
    device = torch.device("cpu" if context.dry_run else "cuda")
    small: dict[str, Any] = {**tiny(context), "num_layers": 2, "ranks": (3,)}
    pool = bench.Pool(device, **(small if context.dry_run else {}))
    return Verdict({"page_copy is right": bench.check(pool)})


def tests(context: Context) -> Verdict:
    """tests/kernels in bfloat16 on this device; pytest writes as it goes to this step's log."""
    folder = ROOT / "tests/kernels"
    code = "import benchmarks.kernels.shapes, sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = ["test_page_copy.py"]
    lora = ["test_lora_kernels.py", "test_lora_shrink.py", "test_lora_expand.py"]
    lora += ["test_lora_logits.py", "test_lora_lookup.py", "test_routed_tiles.py"]
    files += [] if context.dry_run else lora
    command = [sys.executable, "-c", code, "-v", "--maxfail=3", "-c", os.devnull]
    command += ["--rootdir", str(folder), "--confcutdir", str(folder), "-p", "no:cacheprovider"]
    command += [str(folder / name) for name in files]
    command += ["-k", "bfloat16 or not (float16 or float32)"] if not context.dry_run else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    return Verdict({"tests/kernels pass": status == 0}, {"exit status": status})


STEPS = (
    Step("graphs", 120, graphs, interpreted=True),
    Step("page_copy", 60, page_copy, interpreted=True),
    Step("tests", TESTS_S, tests, interpreted=True),
)
