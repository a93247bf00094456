"""Streaming sessions (``/open_session``) with adapters in one small pool.

Each keeps its KV, and the lock on its adapter, until it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import NAMES
from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

POOL_SLOTS = 3600
"""Room for all sessions that are open at once and hold slots: otherwise they would wait for each
other, as in SGLang."""
NUM_TURNS, NUM_TOKENS = 3, 8


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[ServerProcess]:
    flags = [*server_flags(checkpoint, adapters), "--max-total-tokens", str(POOL_SLOTS)]
    flags += ["--enable-streaming-session"]
    log_path = logs / "streaming-sessions.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        yield server


@asynccontextmanager
async def session(client: Client) -> AsyncIterator[str]:
    opened = await client.post("/open_session", {"capacity_of_str_len": 4000, "streaming": True})
    assert opened.status_code == 200, opened.text
    name: str = opened.json()
    yield name
    closed = await client.post("/close_session", {"session_id": name})
    assert closed.status_code == 200, closed.text


async def hold(client: Client, name: str | None, turns: Sequence[list[int]]) -> list[list[int]]:
    """The answers of a session's turns, which send only what is new."""
    answers = []
    async with session(client) as opened:
        for new in turns:
            params: dict[str, Any] = {"session_params": {"id": opened}}
            answer = await client.generate(name, new, num_tokens=NUM_TOKENS, **params)
            answers.append(list(answer.token_ids))
    return answers


async def elora_state(client: Client) -> dict[str, Any]:
    state: dict[str, Any] = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
    return state


async def refusal(client: Client, name: str, opened: str, prompt: list[int]) -> str:
    body = {"input_ids": prompt, "lora_path": name, "session_params": {"id": opened}}
    answer = await client.post("/generate", body)
    assert answer.status_code == 400, answer.text
    return answer.text


async def test_turns_of_streaming_sessions_equal_those_of_peft_under_pressure(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    turns = [list(prompt[1:40]) for prompt in prompts]
    for names in (NAMES[:4], NAMES[4:8], (None, *NAMES[8:])):
        found = await asyncio.gather(*(hold(client, name, turns) for name in names))
        for name, answers in zip(names, found, strict=True):
            history: list[int] = []
            for new, answer in zip(turns, answers, strict=True):
                history += new
                assert answer == reference.generate(name, history, NUM_TOKENS), name
                history += answer
    state = await elora_state(client)
    assert state["adapter_evictions"] > 0 and state["checks"] > 0
    assert state["kv_tokens_invalid"] == 0


async def test_turn_with_another_adapter_is_refused_and_the_session_goes_on(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    first, second = list(prompts[0]), list(prompts[2][1:])
    async with session(client) as opened:
        params = {"session_params": {"id": opened}}
        answer = await client.generate("all-r4", first, num_tokens=NUM_TOKENS, **params)
        for name in ("qv-r4", None):
            body = {"input_ids": second, "lora_path": name, **params}
            refused = await client.post("/generate", body)
            assert refused.status_code == 400, refused.text
            assert "keeps the KV of its first turn's adapter" in refused.text
        history = [*first, *answer.token_ids, *second]
        again = await client.generate("all-r4", second, num_tokens=NUM_TOKENS, **params)
        assert list(again.token_ids) == reference.generate("all-r4", history, NUM_TOKENS)


async def test_unloaded_adapter_stays_until_its_sessions_are_closed(
    client: Client, reference: Reference, adapters: dict[str, Path], prompts: Sequence[list[int]]
) -> None:
    name, prompt = "attention-r8", list(prompts[0])
    async with session(client) as opened:
        params = {"session_params": {"id": opened}}
        await client.generate(name, prompt, num_tokens=NUM_TOKENS, **params)
        before = (await elora_state(client))["adapters_resident"]
        unloaded = await client.post("/unload_lora_adapter", {"lora_name": name})
        assert unloaded.status_code == 200, unloaded.text
        loaded = {"lora_name": name, "lora_path": str(adapters[name])}
        answer = await client.post("/load_lora_adapter", loaded)
        assert answer.status_code == 200, answer.text
        assert "loaded then" in await refusal(client, name, opened, prompt)
        assert (await elora_state(client))["adapters_resident"] >= before
    found = await client.generate(name, prompt, num_tokens=NUM_TOKENS)
    assert list(found.token_ids) == reference.generate(name, prompt, NUM_TOKENS)


async def test_pool_is_free_again_after_all_sessions_are_closed(client: Client) -> None:
    """The largest adapter and the prompt take nearly all of it."""
    long = [5 + i % 500 for i in range(1450)]
    for name in ("all-r64", "mlp-r64", "qv-r4"):
        await client.generate(name, long, num_tokens=2)
    assert (await elora_state(client))["kv_tokens_invalid"] == 0
