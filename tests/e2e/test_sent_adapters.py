"""Adapters sent as tensors are checked like those in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.sent_adapters import PATH, sent


@pytest.fixture(autouse=True)
def share_by_file_name() -> None:
    """A server that is not our child cannot be handed file descriptors."""
    torch.multiprocessing.set_sharing_strategy("file_system")


async def test_adapters_sent_as_tensors_are_served_or_refused(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    folder = adapters["rslora-r8"]
    tensors = load_file(folder / "adapter_model.safetensors")
    narrow = {
        name: (tensor[:, :128].clone() if "lora_A" in name else tensor)
        for name, tensor in tensors.items()
    }
    refused = await client.post(PATH, sent(folder, "sent", narrow))
    assert refused.status_code == 400
    message = refused.json()["error_message"]
    assert "LoRA adapter 'sent' (request/tensors)" in message
    assert "128" in message
    assert "256" in message

    loaded = await client.post(PATH, sent(folder, "sent", tensors))
    assert loaded.status_code == 200, loaded.text
    answer = await client.generate("sent", prompts[0])
    assert list(answer.token_ids) == reference.generate("rslora-r8", prompts[0])
    gone = await client.post("/unload_lora_adapter", {"lora_name": "sent"})
    assert gone.status_code == 200, gone.text
