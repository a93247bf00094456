"""Host time to build the kernels' tables of a batch, as the backend does before each pass.

    python -m benchmarks.kernels.bench_batch_tables [--out DIR]

Runs without a GPU: the tables are in host memory, so the copy to a device is not included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.kernels.shapes import MODULES, ROOT
from sglang_elora.kernels import Batch, BatchTables, adapter_record

NUM_ADAPTERS, MAX_ADAPTERS, REPEATS = 64, 256, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels")
    options = parser.parse_args()
    table = torch.arange(700, dtype=torch.int32)
    offsets = [(0, 0)] * len(MODULES)
    records = [adapter_record(table, 16, 1.0, offsets) for _ in range(NUM_ADAPTERS)]
    batches = {
        **{f"decode {n}": ([(i % NUM_ADAPTERS, 1) for i in range(n)], 16) for n in (1, 64, 256)},
        **{
            f"prefill {n}": ([(i % NUM_ADAPTERS, n // 32) for i in range(32)], 64)
            for n in (2048, 16384)
        },
    }
    batches["prefill 2048 with experts"] = batches["prefill 2048"]
    rows = []
    for name, (segments, tile_rows) in batches.items():
        num_rows = sum(length for _, length in segments)
        used = max(adapter for adapter, _ in segments) + 1
        tables = BatchTables(
            torch.device("cpu"),
            num_modules=len(MODULES),
            max_rows=num_rows,
            max_adapters=MAX_ADAPTERS,
            tile_rows=tile_rows,
            has_experts=name.endswith("with experts"),
        )
        samples = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            tables.load(Batch(np.stack(records[:used]), segments))
            samples.append((time.perf_counter() - begin) * 1e6)
        rows.append({"batch": name, "median_us": statistics.median(samples), "samples_us": samples})
        print(f"{name}: {statistics.median(samples):.0f} us")
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu.rpartition(":")[2].strip(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "rows": rows})
    (options.out / "batch_tables.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
