"""Servers with 1 to 2,000 adapters: start, memory, ``/v1/models``, and the first token.

    python -m benchmarks.scale.many_adapters [--counts 1 100 1000 2000] --out FILE

Stock SGLang and ELORA serve the same adapters of rank 8 with the same bytes for adapters and KV,
one server at a time. After the start, requests of 16 tokens are sent one at a time, each for
another adapter, then the same again, then once more when the server has been idle: ELORA reads
the adapters' files while no request runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.control.connections import LIMITS
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.sides import SHAPE, adapter_bytes  # noqa: E402
from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec, make_adapters  # noqa: E402
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars  # noqa: E402
from sglang_elora.testbed.process_tree import ProcessTree  # noqa: E402
from sglang_elora.testbed.server import (  # noqa: E402
    ELORA_SERVER,
    ServerProcess,
    python_module,
)
from sglang_elora.workloads import FIRST_TOKEN  # noqa: E402

RANK, STOCK_SLOTS, KV_TOKENS = 8, 8, 8_192
NUM_REQUESTS, PROMPT_TOKENS = 64, 16
SYSTEMS = ("stock", "elora")
SETTLE_S = 300.0


def flags(system: str) -> list[str]:
    kv_bytes = 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * 4
    slot_tokens = -(-adapter_bytes(RANK, SHAPE) // kv_bytes)
    if system == "elora":
        return ["--elora", "--max-total-tokens", str(KV_TOKENS + STOCK_SLOTS * slot_tokens)]
    return [
        *("--max-loras-per-batch", str(STOCK_SLOTS), "--max-total-tokens", str(KV_TOKENS)),
    ]


def memory_mb(server: ServerProcess) -> dict[str, float]:
    """Proportional set size in 10^6 bytes of the server's processes, by name."""
    tree = ProcessTree(server.pid)
    tree.collect()
    found: dict[str, float] = {}
    for process in tree.alive():
        name = process.cmdline()[0].rpartition("/")[2] if process.cmdline() else process.name()
        found[name] = found.get(name, 0.0) + process.memory_full_info().pss / 1e6
    return found


def wait_until_idle(server: ServerProcess) -> float:
    """Seconds until the server's processes used less than a tenth of a core for a second."""
    tree, begun = ProcessTree(server.pid), time.perf_counter()
    tree.collect()

    def cpu_s() -> float:
        times = [process.cpu_times() for process in tree.alive()]
        return sum(each.user + each.system for each in times)

    while (waited_s := time.perf_counter() - begun) < SETTLE_S:
        before_s = cpu_s()
        time.sleep(1.0)
        if cpu_s() - before_s < 0.1:
            return waited_s
    raise TimeoutError(f"the server still works {SETTLE_S:.0f} s after the last request")


def ttft_ms(http: httpx.Client, adapter: str, prompt: list[int]) -> float:
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": {"max_new_tokens": 1}}
    begun = time.perf_counter()
    http.post("/generate", json=body).raise_for_status()
    return 1e3 * (time.perf_counter() - begun)


def measure(system: str, checkpoint: Path, adapters: dict[str, Path], log: Path) -> dict[str, Any]:
    rng = random.Random(f"many/{len(adapters)}")
    names = rng.sample([*adapters], min(NUM_REQUESTS, len(adapters)))
    prompts = [rng.choices(range(FIRST_TOKEN, 2000), k=PROMPT_TOKENS) for _ in names]
    server = ServerProcess(
        [
            *("--model-path", str(checkpoint), "--dtype", "float32", "--enable-lora"),
            *("--lora-paths", *(f"{name}={path}" for name, path in adapters.items())),
            *flags(system),
        ],
        log_path=log,
        program=ELORA_SERVER if system == "elora" else python_module("sglang.launch_server"),
        startup_timeout_s=600,
    )
    begun = time.perf_counter()
    with (
        server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False, limits=LIMITS) as http,
    ):
        found: dict[str, Any] = {"start_s": time.perf_counter() - begun}
        found["memory_mb"] = memory_mb(server)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            listed = http.get("/v1/models")
            times.append(1e3 * (time.perf_counter() - begun))
        assert len(listed.json()["data"]) == len(adapters) + 1
        found["models_ms"] = times
        for kind in ("first_ms", "again_ms", "settled_ms"):
            if kind == "settled_ms":
                found["settled_s"] = wait_until_idle(server)
                found["settled_memory_mb"] = memory_mb(server)
            found[kind] = [ttft_ms(http, *pair) for pair in zip(names, prompts, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 100, 1000, 2000])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--out", type=Path, required=True, help="rows are appended")
    options = parser.parse_args()
    silence_progress_bars()
    with tempfile.TemporaryDirectory(prefix="many-") as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "base", shape=SHAPE)
        for count in options.counts:
            specs = [AdapterSpec(f"a{i:04}", RANK, RANK, ALL_LINEAR, seed=i) for i in range(count)]
            adapters = make_adapters(checkpoint, folder / "adapters", specs)
            for system in options.systems:
                begun_at = datetime.now(UTC).isoformat(timespec="seconds")
                found = measure(system, checkpoint, adapters, folder / f"{system}.log")
                row = {**machine(), "begun_at": begun_at, "system": system, "adapters": count}
                with options.out.open("a") as out:
                    out.write(json.dumps({**row, **found}) + "\n")
                print(
                    f"{system}, {count} adapters: start {found['start_s']:.1f} s, memory "
                    + ", ".join(f"{k} {v:.0f}" for k, v in found["memory_mb"].items())
                    + f" MB, /v1/models {statistics.median(found['models_ms']):.1f} ms, request "
                    f"{statistics.median(found['first_ms']):.1f} ms, again "
                    f"{statistics.median(found['again_ms']):.1f} ms, after {found['settled_s']:.0f}"
                    f" s idle {statistics.median(found['settled_ms']):.1f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
