"""Other ways to start: ``sglang serve`` with the environment, no adapters at start, host tier."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_elora.demo.__main__ import main as demo
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint
from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import SPECS
from tests.harness.client import Answer, Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags


@pytest.mark.slow
async def test_sglang_serve_configured_by_environment(
    models: Path, prompts: Sequence[list[int]], logs: Path, spawned_start: None
) -> None:
    """A Qwen3 model and no adapter at start; one is loaded later, with ELORA's semantics."""
    qwen = make_checkpoint(models / "qwen3", architecture="qwen3")
    spec = next(spec for spec in SPECS if spec.name == "rslora-r8")
    adapters = make_adapters(qwen, models / "qwen3-adapters", [spec])
    flags = [
        *server_flags(qwen),
        *("--max-lora-rank", "64", "--lora-target-modules", "all"),
    ]
    program = (str(Path(sys.executable).with_name("sglang")), "serve")
    with ServerProcess(
        flags, log_path=logs / "serve.log", program=program, env={"SGLANG_ELORA": "1"}
    ) as server:
        async with Client(server.url) as client:
            body = {"lora_name": "late", "lora_path": str(adapters["rslora-r8"])}
            loaded = await client.post("/load_lora_adapter", body)
            assert loaded.status_code == 200, loaded.text
            answer = await client.generate("late", prompts[0])
    assert list(answer.token_ids) == Reference(qwen, adapters).generate("rslora-r8", prompts[0])


async def test_host_tier_and_emulated_link(
    checkpoint: Path,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
    logs: Path,
) -> None:
    """KV of many prompts overflows a small pool to the host and is loaded back unchanged."""
    few = {name: adapters[name] for name in ("qv-r4", "attention-r8", "mlp-r24")}
    flags = [
        *("--elora", "--elora-check", "--elora-policy", "lru"),  # it offloads at any cost
        *server_flags(checkpoint, few),
        *("--max-total-tokens", "1024", "--page-size", "16"),
        *("--enable-hierarchical-cache", "--hicache-size", "1"),
        *("--hicache-write-policy", "write_back"),
        *("--elora-link-gbytes-per-s", "2", "--elora-link-latency-us", "20"),
    ]
    many = [[i + 3, *prompts[1], *prompts[0]] for i in range(12)]
    names = (None, *few)

    async def ask_all(client: Client) -> list[Answer]:
        answers: list[Answer] = []
        for start in range(0, len(many), 4):
            requests = [
                client.generate(names[i % len(names)], many[i], num_tokens=16)
                for i in range(start, start + 4)
            ]
            answers += await asyncio.gather(*requests)
        return answers

    with ServerProcess(flags, log_path=logs / "hicache.log") as server:
        async with Client(server.url) as client:
            rounds = [await ask_all(client) for _ in range(2)]
    for answers in rounds:
        for i, answer in enumerate(answers):
            expected = reference.generate(names[i % len(names)], many[i], 16)
            assert list(answer.token_ids) == expected
    # The pool holds a fraction of these prompts, and adapters; hits in round 2 came from the host.
    pages = sum(len(prompt) // 16 for prompt in many)
    assert pages * 16 > 1024
    assert all(answer.cached_tokens >= 16 for answer in rounds[1])


def test_short_demo_loads_and_evicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(["--short", "--dir", str(tmp_path / "demo")]) == 0
    run = json.loads((tmp_path / "demo" / "chats.json").read_text())
    assert len(run["turns"]) == 32 and not run["failures"]
    assert run["counts"]["adapter_loads"] >= len(run["adapters"])
    assert run["counts"]["adapter_evictions"] > 0
    moves = run["adapter_moves"].values()
    assert sum(adapter["num_loads"] for adapter in moves) == run["counts"]["adapter_loads"]
    text = capsys.readouterr().out
    assert "adapter evictions" in text and "/elora/ui" in text and "\x1b" not in text
