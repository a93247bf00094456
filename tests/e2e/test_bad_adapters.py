"""A bad adapter is refused naming file and reason; the server keeps serving the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.bad_adapters import BAD, WEIGHTS, diverge, truncate
from tests.harness.client import MODEL, Client
from tests.harness.reference import Reference


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
async def test_bad_adapter_load_is_refused_and_the_server_keeps_serving(
    spoil: Callable[[Path], None],
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(adapters["attention-r8"], folder)
    spoil(folder)
    loaded = await client.post("/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)})
    assert loaded.status_code == 400
    message = loaded.json()["error_message"]
    assert "'bad'" in message
    assert str(folder) in message
    for part in BAD[spoil]:
        assert part in message

    refused = await client.post("/generate", {"text": "Hello", "lora_path": "bad"})
    assert refused.status_code == 400

    answer = await client.generate("attention-r8", prompts[0])
    assert list(answer.token_ids) == reference.generate("attention-r8", prompts[0])


async def test_repaired_adapter_loads_under_its_refused_name(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
    tmp_path: Path,
) -> None:
    """A refused name is free again: the failed load leaves no state."""
    folder = tmp_path / "mended"
    shutil.copytree(adapters["all-r4"], folder)
    good = (folder / WEIGHTS).read_bytes()
    body = {"lora_name": "mended", "lora_path": str(folder)}
    truncate(folder)
    assert (await client.post("/load_lora_adapter", body)).status_code == 400
    (folder / WEIGHTS).write_bytes(good)
    loaded = await client.post("/load_lora_adapter", body)
    assert loaded.status_code == 200, loaded.text
    assert "mended" in loaded.json()["loaded_adapters"]
    answer = await client.generate("mended", prompts[0])
    assert list(answer.token_ids) == reference.generate("all-r4", prompts[0])
    twice = await client.post("/load_lora_adapter", body)
    assert twice.status_code == 400
    assert "already loaded" in twice.json()["error_message"]
    gone = await client.post("/unload_lora_adapter", {"lora_name": "mended"})
    assert gone.status_code == 200, gone.text


async def test_bad_adapters_at_launch_are_skipped_and_logged(
    client: Client, elora_server: ServerProcess, adapters: dict[str, Path]
) -> None:
    """``elora_server`` was given one of each kind, and one whose folder is not there."""
    reasons = {spoil.__name__: parts for spoil, parts in BAD.items() if spoil is not diverge}
    reasons["missing"] = ("no-such-adapter",)
    models = (await client.get("/v1/models")).json()["data"]
    served = {model["id"] for model in models}
    assert set(adapters) <= served
    assert not served & set(reasons)
    refused = await client.post("/generate", {"text": "Hello", "lora_path": "missing"})
    assert refused.status_code == 400

    # Of the files of --lora-paths only the headers are read at start.
    for _ in range(2):
        failed = await client.post("/generate", {"text": "Hello", "lora_path": "diverge"})
        assert failed.status_code == 503
        assert "'diverge' cannot be loaded" in failed.text and "NaN" in failed.text
    log = elora_server.log_path.read_text().splitlines()
    for name, parts in reasons.items():
        (line,) = [line for line in log if f"Not served: LoRA adapter '{name}'" in line]
        for part in parts:
            assert part in line


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "Hello", "lora_path": "nobody"}),
        ("/generate", {"text": ["Hello", "you"], "lora_path": ["all-r4", "nobody"]}),
        ("/v1/completions", {"model": f"{MODEL}:nobody", "prompt": "Hello"}),
        ("/v1/completions", {"model": MODEL, "prompt": "Hello", "lora_path": "nobody"}),
        (
            "/v1/chat/completions",
            {"model": f"{MODEL}:nobody", "messages": [{"role": "user", "content": "Hello"}]},
        ),
        (
            "/v1/chat/completions",
            {
                "model": f"{MODEL}:nobody",
                "messages": [{"role": "user", "content": "Hello"}],
                "stream": True,
            },
        ),
    ],
)
async def test_request_for_an_unknown_adapter_is_refused(
    path: str, body: dict[str, object], client: Client
) -> None:
    response = await client.post(path, body)
    assert response.status_code == 400
    assert "nobody" in response.text


async def test_request_by_internal_adapter_id_is_refused(
    client: Client, adapters: dict[str, Path]
) -> None:
    response = await client.post("/generate", {"text": "Hello", "lora_id": "0" * 32})
    assert response.status_code == 400
    assert "lora_path" in response.text
