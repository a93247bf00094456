"""Adapters that appear in the watched folder of a running server."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.reference import Reference

SERVABLE_S = 2.0
WATCHED = "watched"


async def test_adapter_dir_serves_new_folders_and_names_broken_ones_once(
    client: Client,
    elora_server: ServerProcess,
    adapter_dir: Path,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    broken = shutil.copytree(adapters["qv-r4"], adapter_dir / ".broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    broken.rename(adapter_dir / "broken")
    (adapter_dir / "outside").symlink_to(adapters["all-r4"])
    shutil.copytree(adapters["attention-r24"], adapter_dir / WATCHED)
    come_s = time.monotonic()
    while (await client.post("/generate", body(WATCHED))).status_code != 200:
        assert time.monotonic() - come_s < SERVABLE_S
        await asyncio.sleep(0.1)
    answer = await client.generate(WATCHED, prompts[0])
    assert list(answer.token_ids) == reference.generate("attention-r24", prompts[0])
    await asyncio.sleep(SERVABLE_S)
    for name in ("broken", "outside"):
        assert (await client.post("/generate", body(name))).status_code == 400
    unloaded = await client.post("/unload_lora_adapter", {"lora_name": WATCHED})
    assert unloaded.status_code == 200, unloaded.text
    log = elora_server.log_path.read_text()
    assert log.count("Not served: adapter 'broken'") == 1
    assert log.count("Not served: adapter 'outside'") == 1
    assert "leads out of" in log


def body(name: str) -> dict[str, object]:
    return {"text": "Hello", "lora_path": name, "sampling_params": {"max_new_tokens": 1}}
