"""Where a decode step's time goes under pressure, in systems that take turns on one trace.

    python -m benchmarks.serving.step_pressure --out FILE [--sides SIDE ...] [--link FILE]

Each scheduler writes a line per batch (``step_probe.step_wall``): seconds of ``run_batch``, of the
model's forward pass and of the sampler in it, requests and adapters. The table has means per
number of requests in a decode batch. "model" has the LoRA layers; "around" is the rest of
``run_batch``: metadata, and for ELORA evictions and copies ahead (``Planner.prepare``), which a GPU
hides behind the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from benchmarks.serving.one_trace import NUM_ADAPTERS, add_flags, link_of, trace_of  # noqa: E402
from benchmarks.serving.step_probe import FILE  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.plain_table import plain_table  # noqa: E402
from sglang_elora.bench.servers import Bench  # noqa: E402
from sglang_elora.bench.sides import Sizes  # noqa: E402
from sglang_elora.bench.turns import Replay, play_in_turns  # noqa: E402
from sglang_elora.bench.variant import write_plugin  # noqa: E402

SIDES = ("elora:elora", "stock-tuned:8+grouped+overlap")
SLICE_S, STOPPED_S = 10.0, 5.0
"""Seconds of a turn; a batch that took longer than ``STOPPED_S`` was stopped in it."""
BATCH_SIZES = (1, 2, 3, 4)


def means(lines: Sequence[Mapping[str, float]]) -> Sequence[str]:
    """Milliseconds of run_batch, model, sampler and the rest; number of adapters and of batches."""
    batch, model, sample = (
        1e3 * statistics.fmean(line.get(name, 0.0) for line in lines)
        for name in ("run_batch", "model", "sample")
    )
    adapters = statistics.fmean(line["num_adapters"] for line in lines)
    figures = (batch, model, sample, batch - model - sample, adapters)
    return [*(f"{figure:.2f}" for figure in figures), str(len(lines))]


def show(rows: Sequence[dict[str, Any]]) -> None:
    head = ("requests", "system", "batch ms", "model", "sampler", "around", "adapters", "batches")
    table = []
    for size in BATCH_SIZES:
        for row in rows:
            lines = [
                line
                for line in row["steps"]
                if line["is_decode"] and line["batch_size"] == size
                if line["run_batch"] < STOPPED_S
            ]
            if lines:
                table.append((str(size), row["side"], *means(lines)))
    print(plain_table(head, table))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", default=SIDES)
    add_flags(parser)
    options = parser.parse_args()
    trace = trace_of(options)
    with tempfile.TemporaryDirectory(prefix="step-pressure-") as name, ExitStack() as stack:
        folder = Path(name)
        bench = Bench(folder, NUM_ADAPTERS, Sizes(), link_of(options))
        probe = Path(__file__).with_name("step_probe.py")
        paths = [*map(str, write_plugin(folder / "plugins", probe, "step_wall"))]
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        servers = []
        for i, side in enumerate(options.sides):
            os.environ[FILE] = str(folder / f"{i}.steps")
            server = bench.server(bench.side(side, trace), folder / f"{i}.log")
            servers.append(stack.enter_context(server))
            server.suspend()
        play_in_turns([Replay(server, trace) for server in servers], SLICE_S)
        facts = {**machine(), **bench.facts(), "trace": trace.facts()}
        rows = [
            {
                **facts,
                "side": side,
                "steps": [json.loads(line) for line in (folder / f"{i}.steps").open()],
            }
            for i, side in enumerate(options.sides)
        ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show(rows)


if __name__ == "__main__":
    main()
