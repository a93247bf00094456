"""Samples of the pool's content during a replay, from the server's endpoints.

ELORA reports slots by use and KV by adapter (``GET /elora/state``). Stock SGLang reports the tokens
of its running requests (``GET /v1/loads``), but not the other cached KV or its adapters: its
invalid KV is only measured by a probe in its scheduler (``benchmarks/invalid_kv``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from sglang_elora.bench.record import PoolSample

_ON_DEVICE = ("device", "loading")


async def pool_sample(http: httpx.AsyncClient, at_s: float) -> PoolSample | None:
    """A sample at time ``at_s``; None if the server has neither of the endpoints."""
    answer = await http.get("/elora/state")
    if answer.status_code == httpx.codes.OK:
        return of_elora(at_s, answer.json())
    answer = await http.get("/v1/loads", params={"include": "core"})
    if answer.status_code == httpx.codes.OK:
        return of_stock(at_s, answer.json())
    return None


def of_elora(at_s: float, state: Mapping[str, Any]) -> PoolSample:
    pool, adapters = state["pool"], state["adapters"]
    return PoolSample(
        at_s=at_s,
        slots=pool["slots"],
        uses=pool["uses"],
        kv=pool["kv"],
        invalid_kv=sum(
            row["kv_tokens_device"] for row in adapters if row["tier"] not in _ON_DEVICE
        ),
        num_waiting=pool["num_waiting"],
        num_running=pool["num_running"],
    )


def of_stock(at_s: float, told: Mapping[str, Any]) -> PoolSample:
    load = told["loads"][0]
    return PoolSample(
        at_s=at_s,
        slots=load["max_total_num_tokens"],
        uses={"running": load["num_used_tokens"]},
        kv=None,
        invalid_kv=None,
        num_waiting=load["num_waiting_reqs"],
        num_running=load["num_running_reqs"],
    )
