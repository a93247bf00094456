"""Stock SGLang and ELORA as a user starts them, measured by SGLang's own client in turns.

    python -m benchmarks.serving.as_installed [--pairs 5] [--models qwen2 demo] --out FILE

``sglang.bench_serving`` with its generated-shared-prefix dataset sends requests to 24 adapters,
drawn for each request or for each session of several turns. All systems have the same bytes for
adapters and KV: with pressure 8 adapter slots of the largest rank and 12,000 tokens of KV, or one
pool of both; without, 90,000 tokens of KV and a slot per adapter. No link is emulated. The
servers of a table run one at a time (the others are stopped by SIGSTOP), in an order that reverses
from pair to pair, and a system may name threads: ``stock@1`` is stock with OMP_NUM_THREADS=1,
``stock`` without any variable in its environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from sglang_elora.bench.machine import machine
from sglang_elora.bench.sides import SHAPE, adapter_bytes, adapter_specs
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import (
    Architecture,
    ModelShape,
    make_checkpoint,
    silence_progress_bars,
)
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess, python_module

NUM_ADAPTERS, MAX_RANK, STOCK_SLOTS = 24, 64, 8
KV_TOKENS = {"pressure": 12_000, "roomy": 90_000}
MODELS: dict[str, tuple[Architecture, ModelShape]] = {
    "qwen2": (
        "qwen2",
        ModelShape(
            hidden_size=384, intermediate_size=768, num_layers=6, num_heads=12, num_kv_heads=4
        ),
    ),
    "demo": ("llama", SHAPE),
}
DRAWN = {
    "request": ("--gsp-num-groups", "12", "--gsp-prompts-per-group", "6"),
    "session": (
        *("--gsp-num-groups", "12", "--gsp-prompts-per-group", "2"),
        *("--gsp-num-turns", "3"),
    ),
}
"""How adapters are drawn; 72 requests in both cases."""
BACKENDS = {"request": "sglang-oai", "session": "sglang-oai-chat"}
"""Names of the endpoints in ``sglang.bench_serving``, whose sessions are chats."""
RATES = {"request": 3.0, "session": 1.0}
"""Arrivals per second, of requests or of sessions of three turns."""
OUTPUT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class System:
    """A server under test: ``stock`` or ``elora``, and ``@N`` for N OpenMP threads."""

    name: str

    @property
    def is_elora(self) -> bool:
        return self.name.startswith("elora")

    @property
    def env(self) -> dict[str, str]:
        threads = self.name.partition("@")[2]
        return {"OMP_NUM_THREADS": threads} if threads else {}


def memory_flags(system: System, shape: ModelShape, memory: str) -> list[str]:
    """Flags that give the system the bytes of ``KV_TOKENS[memory]`` and of the adapter slots."""
    slots = STOCK_SLOTS if memory == "pressure" else NUM_ADAPTERS
    kv_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    slot_tokens = -(-adapter_bytes(MAX_RANK, shape) // kv_bytes)
    if system.is_elora:
        return ["--elora", "--max-total-tokens", str(KV_TOKENS[memory] + slots * slot_tokens)]
    return [
        *("--max-loras-per-batch", str(slots)),
        *("--max-total-tokens", str(KV_TOKENS[memory])),
    ]


@contextmanager
def servers(
    systems: Sequence[System], model: str, memory: str, folder: Path
) -> Iterator[dict[System, ServerProcess]]:
    """All systems' servers, each stopped by SIGSTOP after its start."""
    architecture, shape = MODELS[model]
    checkpoint = make_checkpoint(folder / model, architecture=architecture, shape=shape)
    adapters = make_adapters(checkpoint, folder / f"{model}-lora", adapter_specs(NUM_ADAPTERS))
    common = [
        *("--model-path", str(checkpoint), "--served-model-name", "demo", "--dtype", "float32"),
        *("--enable-lora", "--lora-paths", *(f"{n}={p}" for n, p in adapters.items())),
    ]
    with ExitStack() as stack:
        found = {}
        for system in systems:
            server = ServerProcess(
                [*common, *memory_flags(system, shape, memory)],
                log_path=folder / f"{model}-{memory}-{system.name}.log",
                program=ELORA_SERVER if system.is_elora else python_module("sglang.launch_server"),
                env=system.env,
            )
            found[system] = stack.enter_context(server)
            server.suspend()
        yield found


def measure(url: str, drawn: str, seed: int, tokenizer: Path, out: Path) -> dict[str, Any]:
    """The figures of one run of ``sglang.bench_serving``, and its times of each request."""
    names = [spec.name for spec in adapter_specs(NUM_ADAPTERS)]
    command = (
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", BACKENDS[drawn]),
        *("--base-url", url, "--model", "demo", "--tokenizer", str(tokenizer)),
        *("--dataset-name", "generated-shared-prefix", *DRAWN[drawn]),
        *("--gsp-system-prompt-len", "200", "--gsp-question-len", "40"),
        *("--gsp-output-len", str(OUTPUT_TOKENS), "--request-rate", f"{RATES[drawn]:g}"),
        *("--lora-name", *names, "--lora-request-distribution", "skewed"),
        *("--lora-zipf-alpha", "1.1", "--seed", str(seed), "--flush-cache", "--disable-tqdm"),
        *("--output-file", str(out), "--output-details"),
    )
    out.unlink(missing_ok=True)
    # The dataset is cached in the home folder by its parameters, not by the tokenizer.
    env = {**os.environ, "HOME": str(out.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(out.read_text())
    errors = [error for error in told["errors"] if error]
    assert not errors, errors[0]
    return {
        "completed": told["completed"],
        "ttft_ms": [1e3 * t for t in told["ttfts"]],
        "tpot_ms": [1e3 * sum(gaps) / (OUTPUT_TOKENS - 1) for gaps in told["itls"]],
    }


def cpu_s(server: ServerProcess) -> float:
    """CPU seconds that the server's processes have used."""
    used = [psutil.Process(pid).cpu_times() for pid in server.alive()]
    return sum(times.user + times.system for times in used)


def summary(row: Mapping[str, Any]) -> dict[str, float]:
    ttft, tpot = sorted(row["ttft_ms"]), row["tpot_ms"]
    return {
        "ttft": statistics.mean(ttft),
        "ttft_p99": statistics.quantiles(ttft, n=100, method="inclusive")[98],
        "tpot": statistics.mean(tpot),
        "cpu_s": row["cpu_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first pair; its seed")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--memory", nargs="+", choices=[*KV_TOKENS], default=[*KV_TOKENS])
    parser.add_argument("--drawn", nargs="+", choices=[*DRAWN], default=[*DRAWN])
    parser.add_argument("--systems", nargs="+", default=["stock", "stock@1", "elora"])
    parser.add_argument("--logs", type=Path, help="folder that keeps checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="rows are appended")
    options = parser.parse_args()
    systems = [System(name) for name in options.systems]
    silence_progress_bars()
    with tempfile.TemporaryDirectory(prefix="as-installed-") as name:
        folder = options.logs or Path(name)
        cases = [(model, memory) for model in options.models for memory in options.memory]
        for model, memory in cases:
            with servers(systems, model, memory, folder) as running:
                for drawn in options.drawn:
                    for number in range(options.first, options.first + options.pairs):
                        order = systems[:: -1 if number % 2 else 1]
                        for system in order:
                            server = running[system]
                            server.resume()
                            begun_at = datetime.now(UTC).isoformat(timespec="seconds")
                            out = folder / "details.jsonl"
                            before_s = cpu_s(server)
                            found = measure(server.url, drawn, number, folder / model, out)
                            found["cpu_s"] = cpu_s(server) - before_s
                            server.suspend()
                            case = {"model": model, "memory": memory, "drawn": drawn}
                            case |= {"pair": number, "system": system.name, "begun_at": begun_at}
                            row = {**case, **machine(), **found}
                            with options.out.open("a") as rows:
                                rows.write(json.dumps(row) + "\n")
                            told = ", ".join(f"{k} {v:.1f}" for k, v in summary(row).items())
                            print(*case.values(), told, sep="  ", flush=True)


if __name__ == "__main__":
    main()
