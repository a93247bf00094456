"""Weights of two bytes in a KV pool of one: slots are bytes, whatever they hold."""

from __future__ import annotations

import random
from pathlib import Path

from client import Client, run
from server_flags import server_flags
from sglang_elora.demo.server import ELORA_SERVER, ServerProcess, python_module

NAMES = ("qv-r4", "attention-r24", "mlp-r24", "all-r4", "all-r64", None)


def test_bfloat16_adapters_in_an_fp8_pool(
    checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> None:
    """The same tokens as SGLang with its own LoRA pool, whose KV is rounded alike."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 2000) for _ in range(length)] for length in (7, 60, 130)]
    few = {name: adapters[name] for name in NAMES if name is not None}
    flags = [
        *server_flags(checkpoint, few),
        *("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e5m2"),
    ]

    async def ask(client: Client) -> list[tuple[int, ...]]:
        """One after the other: rounding must not depend on who else is in the batch."""
        answers = []
        for prompt in prompts:
            for name in NAMES:
                answers.append(await client.generate(name, prompt, num_tokens=16))
        return [answer.token_ids for answer in answers]

    outputs = []
    stock = python_module("sglang.launch_server")
    for program, extra in ((stock, []), (ELORA_SERVER, ["--elora", "--elora-check"])):
        log_path = logs / f"fp8-{len(extra)}.log"
        with ServerProcess([*extra, *flags], log_path=log_path, program=program) as server:
            outputs.append(run(server.url, ask))
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > len(outputs[0]) / 2, "the answers say nothing"
