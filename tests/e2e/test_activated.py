"""Activated LoRA: adapters that act from their invocation tokens on share KV before them.

FAMILIES_FULL=1 in the environment runs all modes.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch.multiprocessing
from safetensors.torch import load_file

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.model_families import FAMILIES, Made, make_family
from tests.harness.sent_adapters import PATH, sent
from tests.harness.server_flags import HOST_TIER, server_flags

(LLAMA,) = (family for family in FAMILIES if family.name == "Llama")
INVOCATIONS: Mapping[str, list[int]] = {
    "judge": [901, 902, 903],
    "router": [904],
    "checker": [905, 906],
    "same as judge": [901, 902, 903],
}
PLAIN = "plain"


def make(folder: Path) -> Made:
    """Four activated adapters of unlike ranks and modules, and a plain one."""
    attention = LLAMA.targets["attention"]
    targets = {**dict.fromkeys(INVOCATIONS, attention), PLAIN: attention}
    targets["checker"] = LLAMA.targets["all"]
    options = {
        name: {"alora_invocation_tokens": tokens, "r": 4 * (i + 1)}
        for i, (name, tokens) in enumerate(INVOCATIONS.items())
    }
    return make_family(replace(LLAMA, targets=targets, lora_options=options), folder)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(length)]


MODES: Mapping[str, tuple[str, ...]] = {
    "alone": (),
    "chunks in pages": ("--chunked-prefill-size", "32", "--page-size", "16"),
    "host tier, late streams": (*HOST_TIER, "write_back", "--elora-check-streams", "latest"),
    "two ranks": ("--tp-size", "2"),
}


IN_CI = ("chunks in pages", "host tier, late streams")


async def load_again(client: Client, made: Made, name: str) -> str:
    """Load "judge" under another name, from its folder or with its tensors in the request."""
    folder = made.adapters["judge"]
    if name == "sent":
        tensors = load_file(folder / "adapter_model.safetensors")
        body = sent(folder, name, tensors)
        body["serialized_named_tensors"] *= 2  # for each rank, if there are two
        loaded = await client.post(PATH, body)
    else:
        body = {"lora_name": name, "lora_path": str(folder)}
        loaded = await client.post("/load_lora_adapter", body)
    assert loaded.status_code == 200, loaded.text
    return name


@pytest.mark.parametrize("mode", MODES if "FAMILIES_FULL" in os.environ else IN_CI)
async def test_activated_adapters_answer_as_peft(mode: str, tmp_path: Path, logs: Path) -> None:
    made, rng = make(tmp_path), random.Random(0)
    conversations = [prompt_of(rng, 120) for _ in range(3)]
    questions = []
    for name, invocation in (*INVOCATIONS.items(), *INVOCATIONS.items()):
        conversation = rng.choice(conversations)
        questions += [
            (name, [*conversation, *invocation, *prompt_of(rng, 5)]),
            (name, [*conversation[:50], *invocation, *conversation[50:]]),
            # Only the last of two counts.
            (name, [*conversation[:30], *invocation, 7, *invocation, *prompt_of(rng, 9)]),
            (name, [*invocation, *prompt_of(rng, 20)]),
            (name, conversation),  # never invoked
            (PLAIN, [*conversation, *invocation, 8]),
            (None, [*conversation, *invocation, 8]),
        ]
    questions += questions
    rng.shuffle(questions)
    args = ["--elora", "--elora-check", *server_flags(made.checkpoint, made.adapters)]
    args += ["--max-total-tokens", "700", "--enable-metrics", *MODES[mode]]
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if mode == "two ranks" else {}
    running = asyncio.Semaphore(4)

    async def ask(client: Client, name: str | None, prompt: list[int]) -> tuple[int, ...]:
        async with running:
            return (await client.generate(name, prompt, num_tokens=12)).token_ids

    torch.multiprocessing.set_sharing_strategy("file_system")
    with ServerProcess(args, log_path=logs / f"activated-{mode}.log", env=env) as server:
        async with Client(server.url) as client:
            answers = await asyncio.gather(*(ask(client, *question) for question in questions))
            state = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
            invoked = [*conversations[0], *INVOCATIONS["judge"], 9]
            again = [await load_again(client, made, name) for name in ("from its folder", "sent")]
            answers += [await ask(client, name, invoked) for name in ("judge", *again)]
            metrics = (await client.get("/metrics")).text
            rows = (await client.get("/elora/state")).json()["adapters"]
    assert state["kv_tokens_invalid"] == 0 and state["checks"] > 0
    assert state["adapter_loads"] > len(made.adapters), "no adapter was evicted"
    assert state["shared_tokens"] > 500
    (shared,) = re.findall(r"^sglang:elora_shared_tokens_total\{.*\} (\S+)", metrics, re.M)
    assert float(shared) >= state["shared_tokens"]
    of_adapters = {row["lora_name"]: row["shared_tokens"] for row in rows if row["is_activated"]}
    assert PLAIN not in of_adapters and of_adapters.keys() >= INVOCATIONS.keys()
    assert all(of_adapters[name] > 0 for name in INVOCATIONS), of_adapters
    assert sum(of_adapters.values()) >= state["shared_tokens"]
    questions += [("judge", invoked)] * 3
    reference = made.reference()
    for (name, prompt), output in zip(questions, answers, strict=True):
        expected = reference.generate(name, prompt, num_tokens=12)
        assert list(output) == expected or reference.shortfall(name, prompt, output) < 1e-4, name
    assert len(set(answers)) > len(answers) / 4, "the answers say nothing"
