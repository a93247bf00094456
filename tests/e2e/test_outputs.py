"""Greedy outputs equal those of transformers + PEFT, for any mix of adapters in the batch."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import NAMES
from tests.harness.client import MODEL, Client
from tests.harness.reference import Reference

BASE_AND_ADAPTERS = (None, *NAMES)
MESSAGES = (
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Where does the train to the harbour leave?"},
)


@pytest.mark.parametrize("adapter", BASE_AND_ADAPTERS)
async def test_single_requests_equal_the_reference(
    adapter: str | None,
    client: Client,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    for prompt in prompts:
        answer = await client.generate(adapter, prompt)
        assert list(answer.token_ids) == reference.generate(adapter, prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_mixed_adapter_batch_equals_the_reference(
    stream: bool,
    client: Client,
    elora_server: ServerProcess,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    prompt = prompts[1]
    log_start = len(elora_server.log_path.read_text())
    for round_number in (1, 2):
        requests = [
            client.generate(adapter, prompt, stream=stream) for adapter in BASE_AND_ADAPTERS
        ]
        answers = await asyncio.gather(*requests)
        for adapter, answer in zip(BASE_AND_ADAPTERS, answers, strict=True):
            assert list(answer.token_ids) == reference.generate(adapter, prompt), adapter
        if round_number == 2:
            assert all(answer.cached_tokens > len(prompt) // 2 for answer in answers)

    log = elora_server.log_path.read_text()[log_start:]
    together = max(int(n) for n in re.findall(r"Decode batch.*?#running-req: (\d+)", log))
    assert together == len(BASE_AND_ADAPTERS)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_model_name", [True, False])
async def test_completions_equal_the_reference(
    by_model_name: bool,
    stream: bool,
    client: Client,
    reference: Reference,
) -> None:
    prompt = "The letter was written by"
    ids = reference.tokenizer.encode(prompt)
    requests = [
        client.complete(
            _model(adapter, by_model_name),
            prompt,
            stream=stream,
            **_lora_path(adapter, by_model_name),
        )
        for adapter in BASE_AND_ADAPTERS
    ]
    answers = await asyncio.gather(*requests)
    for adapter, answer in zip(BASE_AND_ADAPTERS, answers, strict=True):
        assert answer.text == reference.text(adapter, ids), adapter


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_model_name", [True, False])
async def test_chat_completions_equal_the_reference(
    by_model_name: bool,
    stream: bool,
    client: Client,
    reference: Reference,
) -> None:
    ids = reference.chat_prompt(MESSAGES)
    requests = [
        client.chat(
            _model(adapter, by_model_name),
            MESSAGES,
            stream=stream,
            **_lora_path(adapter, by_model_name),
        )
        for adapter in BASE_AND_ADAPTERS
    ]
    answers = await asyncio.gather(*requests)
    for adapter, answer in zip(BASE_AND_ADAPTERS, answers, strict=True):
        assert answer.text == reference.text(adapter, ids), adapter


def _model(adapter: str | None, by_model_name: bool) -> str:
    return f"{MODEL}:{adapter}" if by_model_name and adapter else MODEL


def _lora_path(adapter: str | None, by_model_name: bool) -> dict[str, str]:
    return {} if by_model_name or adapter is None else {"lora_path": adapter}
