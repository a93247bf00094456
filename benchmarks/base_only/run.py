"""Base-model traffic only: the overhead of --elora for requests without an adapter.

    python -m benchmarks.base_only.run [--rounds 20] [--out FILE]

A stock server and one with --elora run at the same time, with the same adapters loaded and the same
bytes for KV and adapters. They answer the same requests alternately, one idle while the other
works. Ratios are between adjacent rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import httpx  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.testbed.adapters import make_adapters  # noqa: E402
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint  # noqa: E402
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess, python_module  # noqa: E402
from tests.harness.pressure import PRESSURE_SPECS  # noqa: E402
from tests.harness.server_flags import server_flags  # noqa: E402

PROGRAMS = {"stock": python_module("sglang.launch_server"), "elora": ELORA_SERVER}
NUM_ADAPTERS = 8
NUM_REQUESTS, CONCURRENCY = 48, 8
SHARED_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 64, 128, 32


def prompts(round_number: int) -> list[list[int]]:
    """Prompts of one round; a third of each is shared by all rounds, the rest is new."""
    rng = random.Random(round_number)
    vocab = ModelShape().vocab_size
    shared = random.Random("shared").choices(range(3, vocab), k=SHARED_TOKENS)
    return [shared + rng.choices(range(3, vocab), k=OWN_TOKENS) for _ in range(NUM_REQUESTS)]


async def answer(http: httpx.AsyncClient, prompt: list[int]) -> tuple[float, tuple[int, ...]]:
    """(seconds to the first token, output tokens) of one request."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    started, ttft, last = time.perf_counter(), 0.0, ""
    async with http.stream("POST", "/generate", json=body) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                ttft = ttft or time.perf_counter() - started
                last = line
    return ttft, tuple(json.loads(last[6:])["output_ids"])


async def one_round(url: str, number: int) -> dict[str, Any]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS) as http:

        async def bounded(prompt: list[int]) -> tuple[float, tuple[int, ...]]:
            async with gate:
                return await answer(http, prompt)

        started = time.perf_counter()
        answers = await asyncio.gather(*(bounded(prompt) for prompt in prompts(number)))
        wall_s = time.perf_counter() - started
    return {
        "tokens_per_s": NUM_REQUESTS * OUTPUT_TOKENS / wall_s,
        "ttft_s": [ttft for ttft, _ in answers],
        "outputs": [tokens for _, tokens in answers],
    }


def measure(urls: dict[str, str], num_rounds: int) -> dict[str, list[dict[str, Any]]]:
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in urls}
    for number in range(-2, num_rounds):  # two to warm up
        order = list(urls) if number % 2 else list(reversed(urls))
        found = {side: asyncio.run(one_round(urls[side], number)) for side in order}
        assert found["stock"].pop("outputs") == found["elora"].pop("outputs"), "outputs differ"
        if number >= 0:
            for side, result in found.items():
                rounds[side].append(result)
    return rounds


def ratios(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Ratios of ELORA to stock, per pair of rounds."""
    pairs = list(zip(rounds["elora"], rounds["stock"], strict=True))
    return {
        "throughput": [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs],
        "mean_ttft": [
            statistics.mean(ours["ttft_s"]) / statistics.mean(theirs["ttft_s"])
            for ours, theirs in pairs
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="base-only-") as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "base")
        specs = PRESSURE_SPECS[:NUM_ADAPTERS]
        flags = server_flags(checkpoint, make_adapters(checkpoint, folder / "adapters", specs))
        urls = {}
        for side, program in PROGRAMS.items():
            mine = ["--elora", *flags] if side == "elora" else flags
            server = ServerProcess(mine, log_path=folder / f"{side}.log", program=program)
            urls[side] = stack.enter_context(server).url
        rounds = measure(urls, options.rounds)
    for name, values in ratios(rounds).items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name}: ELORA / stock {median:.3f} (quartiles {low:.3f}, {high:.3f})")
    for side in PROGRAMS:
        throughput = statistics.median(r["tokens_per_s"] for r in rounds[side])
        ttft = statistics.median(statistics.mean(r["ttft_s"]) for r in rounds[side])
        print(f"{side}: {throughput:.0f} output tokens/s, mean TTFT {1e3 * ttft:.1f} ms")
    if options.out is not None:
        facts = {**machine(), "requests": NUM_REQUESTS, "concurrency": CONCURRENCY}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**facts, "rounds": rounds}) + "\n")


if __name__ == "__main__":
    main()
