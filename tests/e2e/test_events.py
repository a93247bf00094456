"""KV events as a router receives them: the adapter of each KV block, and adapter tiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from sglang_elora.control.events import AdapterMoved
from sglang_elora.testbed.server import ServerProcess, free_port
from tests.harness.client import Client
from tests.harness.control import off_device, state
from tests.harness.server_flags import server_flags

NAMES = ("qv-r4", "attention-r8")


class EventBatch(msgspec.Struct, array_like=True):
    """What a router that knows our event decodes."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared | AdapterMoved]
    attn_dp_rank: int | None = None


async def test_events_report_kv_owners_and_adapter_tiers(
    checkpoint: Path, adapters: dict[str, Path], prompts: Sequence[list[int]], logs: Path
) -> None:
    given = {name: adapters[name] for name in NAMES}
    address = f"tcp://127.0.0.1:{free_port()}"
    config = {"publisher": "zmq", "endpoint": address.replace("127.0.0.1", "*")}
    flags = ["--elora", "--elora-adapter-events", *server_flags(checkpoint, given)]
    flags += ["--kv-events-config", json.dumps(config)]
    decoder = msgspec.msgpack.Decoder(EventBatch)
    context = zmq.Context()
    events = context.socket(zmq.SUB)
    events.subscribe("")
    events.connect(address)

    def published() -> tuple[list[BlockStored], list[AdapterMoved]]:
        found: list[Any] = []
        while events.poll(1000):
            found += decoder.decode(events.recv_multipart()[-1]).events
        return (
            [event for event in found if isinstance(event, BlockStored)],
            [event for event in found if isinstance(event, AdapterMoved)],
        )

    try:
        with ServerProcess(flags, log_path=logs / "events.log") as server:
            async with Client(server.url) as client:
                ids = {
                    row["lora_name"]: row["lora_id"] for row in (await state(client))["adapters"]
                }
                published()  # of the start, as far as it was heard
                for name in (*given, None):
                    await client.generate(name, prompts[1])
                    blocks, moved = published()
                    assert blocks and {block.lora_name for block in blocks} == {name}
                    tokens = [token for block in blocks for token in block.token_ids]
                    assert tokens[: len(prompts[1])] == prompts[1]
                    assert {event.lora_id for event in moved} == {ids[name]} if name else not moved
                    assert not name or moved[-1].tier == "device"
                first, second = given
                await off_device(client, first)
                await client.post("/unload_lora_adapter", {"lora_name": second})
                _, moved = published()
                last = {event.lora_name: event.tier for event in moved}
                assert last == {first: "host", second: "unloaded"}
    finally:
        context.destroy(linger=0)
