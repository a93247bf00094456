"""Stage 9: times of the kernels and of SGLang's csgmv, and of stock's adapter loads, by rank.

Needs the bundle's SGLang for csgmv. A dry run measures no times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu.stages.served import (
    EAGER,
    SHAPE,
    Client,
    device_flags,
    run,
    server_flags,
    start_s,
    tokens,
)
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict
from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec, make_adapters
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint
from sglang_elora.testbed.server import ServerProcess, python_module
from tests.harness.plugin_packages import install_plugin

RANKS = (8, 16, 32, 64)
REPEATS = 5
LAYERS = 4
WIDE = ModelShape(4096, 14336, LAYERS, 32, 8, 128, 2048, 8192)


def kernels(context: Context) -> Verdict:
    """Decode of 64 rows and prefill of 2,048 rows with 1, 8 and 64 adapters, by ``kernels.py``."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", "--out", str(context.work)]
    command += ["--parts", "times", "--budget-s", "300", "--only", "decode-64x", "prefill-2048x"]
    command += ["--dry-run"] if context.dry_run else []
    status = subprocess.run(command).returncode
    found = json.loads((context.work / "times.json").read_text())
    wrong = [module["wrong"] for row in found["rows"] for module in row["modules"].values()]
    right = {
        "kernels.py ends well": status == 0,
        "timed kernels are right": bool(wrong) and not any(max(w.values()) for w in wrong),
        "every case was timed": not found["left_out"],
    }
    return Verdict(right, {"cases": [row["case"] for row in found["rows"]]})


def loads(context: Context) -> Verdict:
    """Seconds of stock's ``load_lora_weight_to_buffer`` by rank, layers as wide as Llama-3-8B's.

    One slot, so that every request loads its adapter. The model has ``LAYERS`` layers; a model of
    32 takes in proportion.
    """
    shape = SHAPE if context.dry_run else WIDE
    checkpoint = make_checkpoint(context.models / "loads", shape=shape)
    ranks = RANKS[:2] if context.dry_run else RANKS
    specs = [AdapterSpec(f"r{r}", r, r, ALL_LINEAR, seed=r) for r in ranks]
    adapters = make_adapters(checkpoint, context.models / "loads-adapters", specs)
    plugins = context.models / "plugins"
    plugins.mkdir()
    install_plugin(plugins, "load_times")
    paths = (str(plugins), os.environ.get("PYTHONPATH", ""))
    noted = context.work / "loads.jsonl"
    env = {"LOAD_TIMES": str(noted), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    flags = [*server_flags(checkpoint, adapters), "--dtype", "bfloat16", *EAGER]
    flags += ["--max-loras-per-batch", "1", *device_flags(context)]
    repeats = 2 if context.dry_run else REPEATS

    async def work(client: Client) -> None:
        for _ in range(repeats):
            for name in adapters:
                await tokens(client, name, [5, 6, 7], 1)

    program = python_module("sglang.launch_server")
    log_path = context.work / "loads.server.log"
    with ServerProcess(
        flags, log_path=log_path, program=program, env=env, startup_timeout_s=start_s(context)
    ) as server:
        run(server.url, work)
    rows = [json.loads(line) for line in noted.read_text().splitlines()]
    seconds = {r: [row["seconds"] for row in rows if row["rank"] == r] for r in ranks}
    return Verdict(
        {"stock's loads were timed": all(len(took) >= repeats for took in seconds.values())},
        {"layers": shape.num_layers, "seconds by rank": seconds},
    )


STEPS = (
    Step("kernels", 330, kernels, interpreted=True),
    Step("loads", 140, loads),
)
