"""KV never crosses from one adapter to another, however a request spells its ``extra_key``."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import NAMESPACE_URL, uuid5

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Answer, Client
from tests.harness.reference import Reference


def adapter_id(server: ServerProcess, name: str) -> str:
    """The id SGLang gives an adapter of --lora-paths: a hash of its name and path."""
    prefix = f"{name}="
    path = next(flag for flag in server.command if flag.startswith(prefix)).removeprefix(prefix)
    return uuid5(NAMESPACE_URL, f"{name}\0{path}").hex


async def leak(
    server: ServerProcess, prompt: Sequence[int], adapter: str, extra_key: str
) -> Answer:
    """Let an adapter compute the prompt's KV, then ask the base model under ``extra_key``."""
    async with Client(server.url) as client:
        await client.post("/flush_cache?timeout=30", {})
        await client.generate(adapter, prompt)
        return await client.generate(None, prompt, extra_key=extra_key)


async def test_stock_serves_an_adapters_kv_to_the_base_model(
    stock_server: ServerProcess, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """The fault that patches/01 mends. When this fails, upstream has mended it: drop the patch."""
    prompt = prompts[1]
    answer = await leak(stock_server, prompt, "all-r64", adapter_id(stock_server, "all-r64"))
    assert answer.cached_tokens == len(prompt) - 1
    assert list(answer.token_ids) != reference.generate(None, prompt)


@pytest.mark.parametrize("spelling", ["{id}", "lora/{id}", "lora//{id}", "base/{id}"])
async def test_elora_serves_no_adapter_kv_to_the_base_model(
    spelling: str,
    elora_server: ServerProcess,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    prompt = prompts[1]
    extra_key = spelling.format(id=adapter_id(elora_server, "all-r64"))
    answer = await leak(elora_server, prompt, "all-r64", extra_key)
    assert answer.cached_tokens == 0
    assert list(answer.token_ids) == reference.generate(None, prompt)


async def test_extra_key_shares_kv_with_itself_only(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    prompt = prompts[1]
    await client.post("/flush_cache?timeout=30", {})
    first, again, other_key, no_key = [
        await client.generate("all-r4", prompt, extra_key=key)
        for key in ("tenant-1", "tenant-1", "tenant-2", None)
    ]
    assert again.cached_tokens == len(prompt) - 1
    assert first.cached_tokens == other_key.cached_tokens == no_key.cached_tokens == 0
    expected = reference.generate("all-r4", prompt)
    assert all(list(a.token_ids) == expected for a in (first, again, other_key, no_key))
