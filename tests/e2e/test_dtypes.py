"""16-bit weights in an 8-bit KV pool: slots are bytes, for any dtype."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import exp
from pathlib import Path

import pytest

from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess, python_module
from tests.harness.client import Client
from tests.harness.server_flags import server_flags

NOISE = 0.05
"""Of a probability, by rounding to bfloat16 and fp8."""

NAMES = ("qv-r4", "attention-r24", "mlp-r24", "all-r4", "all-r64", None)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, and the two most likely ones at its place."""

    id: int
    probabilities: dict[int, float]


@pytest.mark.slow
async def test_bfloat16_adapters_in_an_fp8_pool_answer_as_stock(
    checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> None:
    """The same tokens as SGLang with its own LoRA pool, whose KV is rounded alike.

    Sums of bfloat16 products are rounded by each processor's matrix library in its own way, so an
    answer may leave the other one where two tokens are as likely as each other, and only there.
    """
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 2000) for _ in range(length)] for length in (7, 60, 130)]
    few = {name: adapters[name] for name in NAMES if name is not None}
    flags = [
        *server_flags(checkpoint, few),
        *("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e5m2"),
    ]

    async def ask(client: Client) -> list[list[Token]]:
        """Send prompts one at a time: rounding must not depend on other rows of the batch."""
        answers = []
        for prompt in prompts:
            for name in NAMES:
                answers.append(await _answer(client, name, prompt))
        return answers

    outputs = []
    stock = python_module("sglang.launch_server")
    for program, extra in ((stock, []), (ELORA_SERVER, ["--elora", "--elora-check"])):
        log_path = logs / f"fp8-{len(extra)}.log"
        with ServerProcess([*extra, *flags], log_path=log_path, program=program) as server:
            async with Client(server.url) as client:
                outputs.append(await ask(client))
    pairs = list(zip(*outputs, strict=True))
    lengths = [_check_alike(*pair) for pair in pairs]
    print("equal tokens, of 16:", lengths)
    assert sum(lengths) > 0.9 * 16 * len(pairs)
    tokens = {tuple(token.id for token in answer) for answer in outputs[0]}
    assert len(tokens) > len(pairs) / 2, "the answers say nothing"


async def _answer(client: Client, name: str | None, prompt: list[int]) -> list[Token]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 2,
        **({} if name is None else {"lora_path": name}),
    }
    response = await client.post("/generate", body)
    assert response.status_code == 200, response.text
    info = response.json()["meta_info"]
    return [
        Token(token, {other: exp(logprob) for logprob, other, _ in best})
        for (_, token, _), best in zip(
            info["output_token_logprobs"], info["output_top_logprobs"], strict=True
        )
    ]


def _check_alike(one: list[Token], other: list[Token]) -> int:
    """How many tokens are equal; the first ones that are not must be as likely as each other."""
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        shared = a.probabilities.keys() & b.probabilities.keys()
        for token in shared:
            assert abs(a.probabilities[token] - b.probabilities[token]) < NOISE, (place, a, b)
        if a.id != b.id:
            assert len(shared) == 2, (place, a, b)
            return place
    return len(one)
