"""The benchmark's variants of stock SGLang on real servers: outputs, and loads that overlap."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from sglang_elora.bench.variant import write_stock_plugin
from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.server import ServerProcess, python_module
from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

NAMES = ("attention-r8", "attention-r24", "all-r4", "all-r64")
NUM_SLOTS = 2
LOAD_S = 3.0  # of all-r64 on the emulated link
VARIANTS = ("grouped", "overlap")


@pytest.fixture(scope="module", params=["stock", "grouped+overlap"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(
    kind: str,
    checkpoint: Path,
    adapters: dict[str, Path],
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """Two slots for four adapters: more than twice as many as SGLang accepts with overlap."""
    weights = adapters["all-r64"] / "adapter_model.safetensors"
    env = {"SGLANG_ELORA_LINK_GBYTES_PER_S": f"{weights.stat().st_size / LOAD_S / 1e9:.6f}"}
    flags = server_flags(checkpoint)
    flags += ["--max-loras-per-batch", str(NUM_SLOTS), "--lora-paths"]
    flags += [f"{name}={adapters[name]}" for name in NAMES]
    flags += [f"copy-{name}={adapters[name]}" for name in NAMES]
    if kind != "stock":
        folder = tmp_path_factory.mktemp("plugins")
        added = [str(write_stock_plugin(folder, variant)) for variant in VARIANTS]
        paths = (*added, os.environ.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        flags += ["--enable-lora-overlap-loading", "--max-loaded-loras", str(2 * len(NAMES))]
    with ServerProcess(
        flags,
        log_path=logs / f"{kind}.log",
        program=python_module("sglang.launch_server"),
        env=env,
    ) as server:
        yield server


async def test_variants_of_stock_answer_as_transformers_and_peft(
    kind: str, server: ServerProcess, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    cases = [(name, prompt) for prompt in prompts for name in (*NAMES, None)]
    async with Client(server.url) as client:
        answers = await asyncio.gather(*(client.generate(*case, num_tokens=8) for case in cases))
    for case, answer in zip(cases, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(*case, 8), case
    told = server.log_path.read_text().count(
        "stock variant: torch_native computes LoRA per adapter"
    )
    assert (told > 0) == (kind != "stock")


async def test_load_of_an_adapter_stops_running_answers_unless_it_overlaps(
    kind: str, server: ServerProcess, prompts: Sequence[list[int]]
) -> None:
    body = {
        "input_ids": prompts[0],
        "lora_path": "attention-r8",
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
    }
    async with (
        Client(server.url) as client,
        httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=LIMITS) as http,
    ):
        await client.generate("all-r4", prompts[0], num_tokens=1)  # all-r64 is evicted by now
        await client.generate("attention-r24", prompts[0], num_tokens=1)
        moments, other = [], None
        async with http.stream("POST", "/generate", json=body) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    moments.append(time.monotonic())
                    if other is None:
                        asked = client.generate("all-r64", prompts[1], num_tokens=1)
                        other = asyncio.create_task(asked)
        assert other is not None
        await other
    longest_s = max(later - earlier for earlier, later in itertools.pairwise(moments))
    assert (longest_s > 0.9 * LOAD_S) == (kind == "stock"), longest_s
