"""Models that return embeddings, with adapters in one small pool: the vectors are HF + PEFT's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import NAMES
from tests.harness.client import MODEL, Client
from tests.harness.reference import Reference
from tests.harness.server_flags import HOST_TIER, server_flags

POOL_SLOTS = 2600


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[ServerProcess]:
    flags = [*server_flags(checkpoint, adapters), "--max-total-tokens", str(POOL_SLOTS)]
    flags += ["--is-embedding", *HOST_TIER, "write_back"]
    log_path = logs / "embeddings.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        yield server


async def embedding(client: Client, name: str | None, prompt: Sequence[int]) -> torch.Tensor:
    model = MODEL if name is None else f"{MODEL}:{name}"
    answer = await client.post("/v1/embeddings", {"model": model, "input": list(prompt)})
    assert answer.status_code == 200, answer.text
    return torch.tensor(answer.json()["data"][0]["embedding"])


async def test_embeddings_with_adapters_equal_those_of_peft_under_pressure(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    asked = [(name, prompt) for prompt in prompts for name in (*NAMES, None)]
    for _ in range(2):  # the second time with cached prefixes
        found = await asyncio.gather(*(embedding(client, *request) for request in asked))
        for (name, prompt), vector in zip(asked, found, strict=True):
            expected = reference.embedding(name, prompt)
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-4, msg=str(name))
    state = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
    assert state["adapter_evictions"] > 0 and state["checks"] > 0
    assert state["kv_tokens_invalid"] == 0


async def test_embedding_prompt_that_does_not_fit_with_its_adapter_is_refused(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    long = [5 + i % 500 for i in range(1200)]
    refused = await client.post("/v1/embeddings", {"model": f"{MODEL}:all-r64", "input": long})
    assert refused.status_code == 400, refused.text
    assert "does not fit into the KV pool of 2600 slots" in refused.text
    await embedding(client, "qv-r4", long)
    vector = await embedding(client, "all-r64", prompts[0])
    torch.testing.assert_close(
        vector, reference.embedding("all-r64", prompts[0]), rtol=0, atol=1e-4
    )
