"""Queries and orders that tests send to a server's cache over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tests.harness.client import Client


async def state(client: Client) -> dict[str, Any]:
    answer = await client.get("/elora/state")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def adapter(client: Client, name: str) -> dict[str, Any]:
    answer = await client.get(f"/elora/state?lora_name={name}")
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["adapters"]
    return dict(row)


async def until(condition: Callable[[dict[str, Any]], bool], client: Client, name: str) -> None:
    deadline = time.monotonic() + 20
    while not condition(row := await adapter(client, name)):
        assert time.monotonic() < deadline, row
        await asyncio.sleep(0.05)


async def order(client: Client, what: str, name: str, **more: Any) -> dict[str, Any]:
    answer = await client.post(f"/elora/{what}", {"lora_name": name, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["success"] and found["error_message"] == ""
    return found


async def on_device(client: Client, name: str) -> None:
    await order(client, "prefetch", name)
    await until(lambda row: row["tier"] == "device", client, name)


async def off_device(client: Client, name: str) -> None:
    await order(client, "evict", name)
    await until(lambda row: row["tier"] in ("host", "disk"), client, name)
