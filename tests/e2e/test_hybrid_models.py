"""Models whose layers are not all alike answer as transformers + PEFT: some have a state in place
of KV, or KV of a sliding window in a pool of its own.

An adapter's weights for all layers lie in the layers of the pool of full attention.

FAMILIES_FULL=1 in the environment runs all families, each in all ways.
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
from tests.harness.hybrid_families import HYBRIDS, WINDOWED
from tests.harness.model_families import VOCABULARY, Family, make_family
from tests.harness.server_flags import server_flags

RANKS = (2, 8, 16, 32)
NUM_TURNS, NUM_TOKENS = 3, 8


_STATES, _WINDOWS = ("--max-mamba-cache-size", "40"), ("--swa-full-tokens-ratio", "0.1")
_TWO_RANKS = ("--tp-size", "2")
STATES = {
    "states at every 64th token": _STATES,
    "states at the end": (
        *(*_STATES, "--mamba-radix-cache-strategy", "no_buffer"),
        "--disable-overlap-schedule",
    ),
    "states, two ranks": (*_STATES, *_TWO_RANKS),
    "states, late streams": (*_STATES, "--elora-check-streams", "latest"),
}
WINDOWS = {
    "windows, late streams": (*_WINDOWS, "--elora-check-streams", "latest"),
    "windows in pages": (*_WINDOWS, "--page-size", "16"),
    "windows, two ranks": (*_WINDOWS, *_TWO_RANKS),
}
IN_CI = [
    ("Qwen3.5", "states at every 64th token"),
    ("Nemotron-H", "states at the end"),
    ("gpt-oss", "windows, late streams"),
]
SERVED = [
    pytest.param(family, flags, id=f"{family.name}, {kept}")
    for families, kinds in ((HYBRIDS, STATES), (WINDOWED, WINDOWS))
    for family in families
    for kept, flags in kinds.items()
    if (family.name, kept) in IN_CI or "FAMILIES_FULL" in os.environ
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


@pytest.mark.parametrize(("family", "flags"), SERVED)
async def test_chats_with_many_adapters_equal_transformers_under_pressure(
    family: Family, flags: tuple[str, ...], tmp_path: Path, logs: Path
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

    args = [
        *("--elora", "--elora-check"),
        *server_flags(made.checkpoint),
        *("--lora-target-modules", "all", "--max-lora-rank", "32"),
        *("--max-total-tokens", str(family.pool_slots), *flags),
        *("--lora-paths", *(f"{name}={path}" for name, path in made.adapters.items())),
    ]
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if "--tp-size" in flags else {}
    log_path = logs / f"hybrid-{family.name}.log"
    with ServerProcess(args, log_path=log_path, env=env) as server:
        async with Client(server.url) as client:
            async with asyncio.TaskGroup() as chats:
                for name in (*names, *names):  # the second time it has been evicted
                    chats.create_task(chat(client, name))
            found = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
    assert found["kv_tokens_invalid"] == 0 and found["checks"] > 0
    assert found["adapter_loads"] > len(made.adapters), "no adapter was evicted"
    assert num_cached > len(names) * 30, "KV was not found again"
    reference = made.reference()
    for (name, prompt), output in answers.items():
        expected = reference.generate(name, prompt, num_tokens=NUM_TOKENS)
        assert list(output) == expected or reference.shortfall(name, prompt, output) < 1e-4, name
    assert len(set(answers.values())) > len(answers) / 4, "the answers say nothing"
