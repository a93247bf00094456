"""Models some of whose layers have a state in place of KV answer as transformers + PEFT.

An adapter's weights for all layers lie in the pool's layers, which may be fewer.

FAMILIES_FULL=1 in the environment runs all families, each with both ways to keep states.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.model_families import HYBRIDS, VOCABULARY, Family, make_family
from tests.harness.server_flags import server_flags

RANKS = (2, 8, 16, 32)
NUM_TURNS, NUM_TOKENS = 3, 8


KEPT = ("at every 64th token", "at the end")  # where states are kept: see ``flags`` below
SOME = [("Qwen3.5", KEPT[0]), ("Nemotron-H", KEPT[1])]
SERVED = [
    pytest.param(family, states, id=f"{family.name}, {states}")
    for family in HYBRIDS
    for states in KEPT
    if (family.name, states) in SOME or "FAMILIES_FULL" in os.environ
]


def many_adapters(family: Family) -> Family:
    """The family, with an adapter of each rank for each of its targets."""
    targets = {
        f"{name} {rank}": modules for name, modules in family.targets.items() for rank in RANKS
    }
    options = {}
    for name in targets:
        kind, _, rank = name.rpartition(" ")
        # With a higher alpha, a state space multiplies rounding errors up.
        alpha = min(2 * int(rank), 16)
        options[name] = {**family.lora_options.get(kind, {}), "r": int(rank), "lora_alpha": alpha}
    return replace(family, targets=targets, lora_options=options)


@pytest.mark.parametrize(("family", "states"), SERVED)
async def test_chats_with_many_adapters_equal_transformers_under_pressure(
    family: Family, states: str, tmp_path: Path, logs: Path
) -> None:
    made = make_family(many_adapters(family), tmp_path)
    names = [None, *made.adapters]
    rng = random.Random(0)
    running = asyncio.Semaphore(4)
    answers: dict[tuple[str | None, tuple[int, ...]], tuple[int, ...]] = {}
    num_cached = 0

    async def chat(client: Client, name: str | None) -> None:
        nonlocal num_cached
        async with running:
            prompt = rng.choices(range(3, VOCABULARY), k=rng.randrange(5, 90))
            for _ in range(NUM_TURNS):
                answer = await client.generate(name, prompt, num_tokens=NUM_TOKENS)
                answers[name, tuple(prompt)] = answer.token_ids
                num_cached += answer.cached_tokens
                prompt += [*answer.token_ids, *rng.choices(range(3, VOCABULARY), k=40)]

    flags = [
        *server_flags(made.checkpoint),
        *("--lora-target-modules", "all", "--max-lora-rank", "32"),
        *("--max-total-tokens", "6000", "--max-mamba-cache-size", "40"),
        *("--lora-paths", *(f"{name}={path}" for name, path in made.adapters.items())),
    ]
    if states == "at the end":
        flags += ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"]
    log_path = logs / f"hybrid-{family.name}-{states}.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        async with Client(server.url) as client:
            async with asyncio.TaskGroup() as chats:
                for name in (*names, *names):  # the second time it has been evicted
                    chats.create_task(chat(client, name))
            found = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
    assert found["kv_tokens_invalid"] == 0 and found["checks"] > 0
    assert found["adapter_loads"] > len(made.adapters), "no adapter was evicted"
    assert num_cached > len(names) * 40, "states were not found again"
    reference = made.reference()
    for (name, prompt), output in answers.items():
        expected = reference.generate(name, prompt, num_tokens=NUM_TOKENS)
        assert list(output) == expected or reference.shortfall(name, prompt, output) < 1e-4, name
    assert len(set(answers.values())) > len(answers) / 4, "the answers say nothing"
