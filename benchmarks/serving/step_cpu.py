"""CPU time of a scheduler step without the model, stock SGLang against ELORA, on one trace.

    python -m benchmarks.serving.step_cpu [--rounds 3] --out FILE

What is timed is the scheduler thread's own time (``thread_time``) outside the model's forward pass
and the sampler: choosing a batch, admission, loads, metadata, results and the cache. On a GPU a
step waits for this time if it is longer than the forward pass of the step before. Both servers have
every adapter on the device, so that no copies are included; they run in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from benchmarks.serving.step_probe import FILE  # noqa: E402
from sglang_elora.bench.driver import play_closed  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.servers import Bench  # noqa: E402
from sglang_elora.bench.sides import Sizes, common_flags  # noqa: E402
from sglang_elora.bench.variant import write_plugin  # noqa: E402
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess, python_module  # noqa: E402
from sglang_elora.workloads import CHAT, FIRST_TOKEN, Session, Turn  # noqa: E402

NUM_ADAPTERS, CLIENTS, TURNS, TOKENS = 8, 16, 3, 60_000
SYSTEMS = {
    "stock": (python_module("sglang.launch_server"), ("--max-loras-per-batch", str(NUM_ADAPTERS))),
    "elora": (ELORA_SERVER, ("--elora",)),
}
PHASES = ("get_next_batch_to_run", "run_batch", "process_batch_result")


def chats(adapters: Sequence[str], count: int, seed: int) -> list[Session]:
    """Chats of three turns, with a system prompt per adapter."""
    rng = random.Random(f"step/{seed}")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(FIRST_TOKEN, CHAT.vocab_size), k=count))

    prompts = {adapter: tokens(100) for adapter in adapters}
    return [
        Session(i, name, 0.0, prompts[name], tuple(Turn(tokens(40), 24, 0.0) for _ in range(TURNS)))
        for i, name in zip(range(count), cycle(adapters), strict=False)
    ]


def step_us(line: dict[str, float]) -> float:
    """Microseconds of a step without the model's forward pass and the sampler."""
    total = sum(line.get(phase, 0.0) for phase in PHASES)
    return 1e6 * (total - line.get("model", 0.0) - line.get("sample", 0.0))


def show(rows: Sequence[dict[str, Any]]) -> None:
    for kind in ("decode", "prefill"):
        for system in SYSTEMS:
            lines = [
                line
                for row in rows
                if row["system"] == system
                for line in row["steps"]
                if bool(line["is_decode"]) == (kind == "decode")
            ]
            values = sorted(step_us(line) for line in lines)
            size = statistics.mean(line["batch_size"] for line in lines)
            parts = {
                phase: 1e6 * statistics.median(line.get(phase, 0.0) for line in lines)
                for phase in ("get_next_batch_to_run", "process_batch_result")
            }
            print(
                f"{kind}, {system}: {len(values)} steps of {size:.1f} requests, median "
                f"{statistics.median(values):.0f} us, mean {statistics.mean(values):.0f}, P99 "
                f"{values[int(0.99 * len(values))]:.0f}; "
                + ", ".join(f"{name} {value:.0f}" for name, value in parts.items())
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="step-cpu-") as name, ExitStack() as stack:
        folder = Path(name)
        bench = Bench(folder, NUM_ADAPTERS, Sizes(), link=None)
        probe = Path(__file__).with_name("step_probe.py")
        added = write_plugin(folder / "plugins", probe, "step_cpu")
        paths = os.pathsep.join(filter(None, (*map(str, added), os.environ.get("PYTHONPATH"))))
        adapters = {path.name: path for path in sorted((folder / "adapters").iterdir())}
        urls, files = {}, {}
        for system, (program, flags) in SYSTEMS.items():
            files[system] = folder / f"{system}.steps"
            server = ServerProcess(
                [
                    *common_flags(bench.checkpoint, adapters),
                    *flags,
                    "--max-total-tokens",
                    f"{TOKENS}",
                ],
                log_path=folder / f"{system}.log",
                program=program,
                env={"PYTHONPATH": paths, FILE: str(files[system])},
            )
            urls[system] = stack.enter_context(server).url
        for number in range(-1, options.rounds):  # one to warm up
            sessions = chats([*adapters], options.sessions, number)
            for system in [*SYSTEMS][:: -1 if number % 2 else 1]:
                before = len(files[system].read_text().splitlines())
                play_closed(urls[system], sessions, CLIENTS)
                lines = files[system].read_text().splitlines()[before:]
                if number >= 0:
                    steps = [json.loads(line) for line in lines]
                    rows.append({**machine(), "system": system, "round": number, "steps": steps})
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show(rows)


if __name__ == "__main__":
    main()
