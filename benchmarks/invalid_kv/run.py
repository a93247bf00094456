"""Share of invalid KV on the device, whose adapter is not on the device: stock and ELORA.

    python -m benchmarks.invalid_kv.run [--sides stock elora] [--runs 3] [--out DIR]

Both sides serve the same chats (tests/e2e/pressure.py) with the same number of bytes for adapters
and KV: stock splits them into --stock-adapters adapter slots and a KV pool, ELORA has one pool.
Runs of the sides alternate. probe.py samples inside the scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import httpx  # noqa: E402

from benchmarks.invalid_kv import probe  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.testbed.adapters import ALL_LINEAR, make_adapters  # noqa: E402
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint  # noqa: E402
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess, python_module  # noqa: E402
from tests.harness.plugin_packages import write_plugin  # noqa: E402
from tests.harness.pressure import (  # noqa: E402
    PRESSURE_SPECS,
    Record,
    Trace,
    adapter_slots,
    make_trace,
    plane_elements,
    run_trace,
)
from tests.harness.server_flags import server_flags  # noqa: E402

SIDES = ("stock", "elora")
SAMPLE_EVERY = 5  # scheduler steps
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Device bytes of both sides, from the shapes of the demo's model."""

    stock_adapters: int
    stock_kv_tokens: int

    @property
    def slot_bytes(self) -> int:
        shape = ModelShape()
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * _FLOAT32

    @property
    def slab_slot_bytes(self) -> int:
        """Bytes of one of stock's adapter slots: the largest rank on every targeted module."""
        rank = max(spec.rank for spec in PRESSURE_SPECS)
        largest = replace(PRESSURE_SPECS[0], rank=rank, target_modules=ALL_LINEAR)
        return ModelShape().num_layers * sum(plane_elements(largest)) * _FLOAT32

    @property
    def total_bytes(self) -> int:
        kv_bytes = self.stock_kv_tokens * self.slot_bytes
        return self.stock_adapters * self.slab_slot_bytes + kv_bytes

    @property
    def elora_slots(self) -> int:
        return self.total_bytes // self.slot_bytes

    def facts(self) -> dict[str, int]:
        return {
            "stock_adapters": self.stock_adapters,
            "stock_kv_tokens": self.stock_kv_tokens,
            "elora_slots": self.elora_slots,
            "total_bytes": self.total_bytes,
            "bytes_of_all_adapters_in_slab": len(PRESSURE_SPECS) * self.slab_slot_bytes,
            "bytes_of_all_adapters_in_pages": self.slot_bytes
            * sum(adapter_slots(spec) for spec in PRESSURE_SPECS),
        }


class Bench:
    """Creates servers with one checkpoint in ``folder`` and with the probe plugin."""

    def __init__(self, folder: Path, sizes: Sizes, trace: Trace) -> None:
        self._folder = folder
        self._sizes = sizes
        self._trace = trace
        self._checkpoint = make_checkpoint(folder / "base")
        self._adapters = make_adapters(self._checkpoint, folder / "adapters", PRESSURE_SPECS)
        self._plugins = folder / "plugins"
        self._plugins.mkdir()
        write_plugin(self._plugins, "invalid_kv_probe", "import probe\nprobe.load()")

    def run(self, side: str, number: int) -> dict[str, Any]:
        name = f"{side}-{number}"
        samples = self._folder / f"{name}.jsonl"
        paths = (str(self._plugins), str(Path(probe.__file__).parent), os.environ.get("PYTHONPATH"))
        env = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
            probe.OUT: str(samples),
            probe.EVERY: str(SAMPLE_EVERY),
        }
        flags, program = self._server(side)
        log_path = self._folder / f"{name}.log"
        with ServerProcess(flags, log_path=log_path, program=program, env=env) as server:
            started = time.perf_counter()
            records = run_trace(server.url, self._trace)
            wall_s = time.perf_counter() - started
            num_rows = len(samples.read_text().splitlines())
            asyncio.run(burst(server.url))
        errors = [record.error for record in records if record.error is not None]
        assert not errors, errors[:3]
        first, *rows = [json.loads(line) for line in samples.read_text().splitlines()]
        allocated = sum(first["bytes"].values()) - self._sizes.slot_bytes  # SGLang's dummy slot
        assert allocated == self._sizes.total_bytes, (first, self._sizes.total_bytes)
        return {
            "side": side,
            "run": number,
            "wall_s": round(wall_s, 2),
            "requests": len(records),
            "prompt_tokens": sum(record.num_prompt for record in records),
            "cached_tokens": sum(record.num_cached for record in records),
            "outputs": outputs_digest(records),
            **first,
            "rows": rows[: num_rows - 1],
            "burst_rows": rows[num_rows - 1 :],
        }

    def _server(self, side: str) -> tuple[list[str], Sequence[str]]:
        flags = server_flags(self._checkpoint)
        paths = [f"{name}={path}" for name, path in self._adapters.items()]
        if side == "elora":
            pool = ("--max-total-tokens", str(self._sizes.elora_slots))
            return ["--elora", *flags, *pool, "--lora-paths", *paths], ELORA_SERVER
        split = (
            *("--max-total-tokens", str(self._sizes.stock_kv_tokens)),
            *("--max-loras-per-batch", str(self._sizes.stock_adapters)),
        )
        return [*flags, *split, "--lora-paths", *paths], python_module("sglang.launch_server")


async def burst(url: str) -> None:
    """Send requests for all adapters at once, with answers long enough to be in one batch."""
    sampling = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=LIMITS) as http:
        bodies = [
            {"input_ids": list(range(3, 19)), "sampling_params": sampling, "lora_path": spec.name}
            for spec in PRESSURE_SPECS
        ]
        answers = await asyncio.gather(*(http.post("/generate", json=body) for body in bodies))
    assert all(answer.status_code == httpx.codes.OK for answer in answers)


def outputs_digest(records: Sequence[Record]) -> int:
    """Equal for equal outputs; Python hashes tuples of ints the same in every process."""
    return hash(tuple(sorted((record.key, record.output) for record in records)))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Statistics of all samples of one side."""
    rows = [row for run in runs for row in run["rows"] if row["kv_tokens_device"] > 0]
    of_cached = [row["kv_tokens_invalid"] / row["kv_tokens_device"] for row in rows]
    of_all = [
        row["kv_tokens_invalid"] / (row["kv_tokens_device"] + row["kv_tokens_uncached"])
        for row in rows
    ]
    return {
        "samples": len(rows),
        "invalid_of_cached_mean": statistics.mean(of_cached),
        "invalid_of_cached_max": max(of_cached),
        "invalid_of_all_kv_mean": statistics.mean(of_all),
        "adapters_in_batch_max": max(row["adapters_in_batch"] for row in rows),
        "adapters_in_batch_of_burst": max(
            row["adapters_in_batch"] for run in runs for row in run["burst_rows"]
        ),
        "adapters_resident_mean": statistics.mean(row["adapters_resident"] for row in rows),
        "hit_rate": sum(r["cached_tokens"] for r in runs) / sum(r["prompt_tokens"] for r in runs),
        "wall_s_median": statistics.median(run["wall_s"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stock-adapters", type=int, default=8, help="SGLang's default is 8")
    parser.add_argument("--stock-kv-tokens", type=int, default=8192)
    parser.add_argument("--small", action="store_true", help="150 requests instead of 600")
    parser.add_argument("--out", type=Path, help="folder for samples.json")
    options = parser.parse_args()
    sizes = Sizes(options.stock_adapters, options.stock_kv_tokens)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="invalid-kv-") as folder:
        bench = Bench(Path(folder), sizes, make_trace(small=options.small))
        for number in range(options.runs):
            for side in options.sides:
                runs.append(bench.run(side, number))
                print(f"{side} {number}: {runs[-1]['wall_s']} s", flush=True)
    assert len({run["outputs"] for run in runs}) == 1, "outputs differ between runs"
    summaries = {side: summary([r for r in runs if r["side"] == side]) for side in options.sides}
    missing = [side for side in SIDES if side not in options.sides]
    for side, figures in summaries.items():
        print(side, *(f"  {name}: {figure:.3f}" for name, figure in figures.items()), sep="\n")
    facts = {**machine(), **sizes.facts(), "sample_every_steps": SAMPLE_EVERY, "missing": missing}
    print(json.dumps(facts, indent=1))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {**facts, "summary": summaries, "runs": runs}
        (options.out / "samples.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
