"""Stage 7: KV that a session's hint loads back is not read before its copy is complete.

The KV of a chat is offloaded, a hint for its session is sent, and its next request immediately
after it. The answer must equal that of a cold cache.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.gpu.stages.served import EAGER, agreement, elora_server, prompts, tokens
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict
from tests.harness.adapter_specs import NAMES
from tests.harness.client import Client, run

ADAPTER = NAMES[2]
HOST_TIER = (
    *("--enable-hierarchical-cache", "--hicache-size", "1", "--hicache-io-backend", "direct"),
    *("--hicache-mem-layout", "layer_first", "--hicache-write-policy", "write_through"),
)
POLLS = 200


async def until(client: Client, is_so: Any) -> dict[str, Any]:
    """The adapter's row of /elora/state, once ``is_so`` holds of it."""
    for _ in range(POLLS):
        read = (await client.get(f"/elora/state?lora_name={ADAPTER}")).json()
        row: dict[str, Any] = read["adapters"][0]
        if is_so(row):
            return row
        await asyncio.sleep(0.05)
    raise AssertionError(f"not so after {POLLS} looks: {row}")


async def evict(client: Client) -> None:
    """Offload the adapter and its KV; it stays in use for a moment after its last answer."""
    for _ in range(POLLS):
        if (await client.post("/elora/evict", {"lora_name": ADAPTER})).status_code == 200:
            break
        await asyncio.sleep(0.05)
    await until(client, lambda row: row["kv_tokens_device"] == 0)


async def one_round(client: Client, prompt: list[int], number: int) -> tuple[Any, Any, int]:
    """The cold answer, the answer right after the hint, and tokens that were on the host."""
    await client.post("/flush_cache?timeout=30", {})
    cold = await tokens(client, ADAPTER, prompt, number, session_id="announced")
    await until(client, lambda row: row["kv_tokens_host"] >= len(prompt))
    await evict(client)
    on_host = (await until(client, lambda row: True))["kv_tokens_host"]
    hinted = await client.post("/elora/prefetch", {"session_id": "announced"})
    assert hinted.status_code == 200, hinted.text
    warm = await tokens(client, ADAPTER, prompt, number, session_id="announced")
    await client.post("/close_session", {"session_id": "announced"})
    return cold, warm, on_host


def announced(context: Context) -> Verdict:
    rounds, number = (1, 3) if context.dry_run else (12, 16)
    prompt = prompts(context)[-1] * (8 if context.dry_run else 13)

    async def work(client: Client) -> list[tuple[Any, Any, int]]:
        return [await one_round(client, [i + 3, *prompt], number) for i in range(rounds)]

    lora = "elora_torch" if context.dry_run else "elora_triton"
    with elora_server(context, "announced", lora, (*EAGER, *HOST_TIER)) as server:
        found = run(server.url, work)
    cold, warm, on_host = zip(*found, strict=True)
    close = agreement(list(cold), list(warm))
    facts = {**close, "on_host": on_host, "cached": [answer["cached"] for answer in warm]}
    return Verdict(
        {
            "answers right after the hint are those of a cold cache": close["agree"],
            "the KV was on the host": min(on_host) >= len(prompt),
            "the requests used the KV that was loaded back": min(facts["cached"]) >= len(prompt),
        },
        facts,
    )


STEPS = (Step("announced", 400, announced),)
