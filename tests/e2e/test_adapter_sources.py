"""Adapters that requests name before they are loaded, and the sources they may come from."""

from __future__ import annotations

import asyncio
import functools
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

NEAR, FAR, OUTSIDE = "attention-r8", "mlp-r24", "all-r4"


@dataclass(frozen=True, slots=True)
class Places:
    folder: Path
    served: Path  # over HTTP
    url: str
    outside: Path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def places(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    root = tmp_path_factory.mktemp("places")
    folder, served, outside = root / "folder", root / "served", root / "outside"
    shutil.copytree(adapters[NEAR], folder / "team" / "near")
    shutil.copytree(adapters[FAR], served / "adapters" / "far")
    shutil.copytree(adapters[OUTSIDE], outside)
    broken = shutil.copytree(adapters[NEAR], folder / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    (folder / "linked").symlink_to(outside)
    handler = functools.partial(Quiet, directory=str(served))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield Places(folder, served, f"http://127.0.0.1:{server.server_port}/adapters", outside)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, adapters: dict[str, Path], places: Places, logs: Path
) -> Iterator[ServerProcess]:
    start = {"start": Path(adapters["qv-r4"])}
    flags = ["--elora", "--elora-check", *server_flags(checkpoint, start)]
    flags += ["--elora-adapter-sources", f"{places.folder}, {places.url}"]
    flags += ["--max-lora-rank", "24", "--lora-target-modules", "all"]
    cache = {"XDG_CACHE_HOME": str(places.outside.parent / "cache")}
    with ServerProcess(flags, log_path=logs / "sources.log", env=cache) as server:
        yield server


@pytest.mark.parametrize(("name", "adapter"), [("team/near", NEAR), ("far", FAR)])
async def test_first_request_loads_an_adapter_from_its_source(
    name: str,
    adapter: str,
    client: Client,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    answers = await asyncio.gather(*(client.generate(name, ids) for ids in prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(adapter, ids)
    chat = await client.post("/v1/completions", {"model": name, "prompt": "Hello"})
    assert chat.status_code == 200, chat.text
    assert name in [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


async def test_adapter_changed_at_its_url_is_loaded_as_a_new_one(
    client: Client,
    places: Places,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    folder = places.served / "adapters" / "changing"
    for adapter in (FAR, NEAR):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapters[adapter], folder)
        answer = await client.generate("changing", prompts[0])
        assert list(answer.token_ids) == reference.generate(adapter, prompts[0])
        gone = await client.post("/unload_lora_adapter", {"lora_name": "changing"})
        assert gone.status_code == 200, gone.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", "never been loaded"),
        ("linked", "never been loaded"),
        ("../outside", "never been loaded"),
        ("folder/../../outside", "never been loaded"),
        ("broken", "adapter_model.safetensors"),
    ],
)
async def test_request_for_an_adapter_outside_the_sources_is_refused(
    name: str, reason: str, client: Client, places: Places, prompts: Sequence[list[int]]
) -> None:
    """The error reveals neither the server's paths nor its other adapters."""
    for _ in range(2):
        answer = await client.post("/generate", {"text": "Hello", "lora_path": name})
        assert answer.status_code == 400
        assert reason in answer.text
        assert str(places.folder) not in answer.text and "start" not in answer.text
    assert (await client.generate("start", prompts[0])).token_ids


async def test_load_api_refuses_paths_outside_the_sources(
    client: Client, places: Places, adapters: dict[str, Path]
) -> None:
    async def load(client: Client, path: str) -> tuple[int, str]:
        body = {"lora_name": "asked-for", "lora_path": path}
        answer = await client.post("/load_lora_adapter", body)
        if answer.status_code == 200:
            await client.post("/unload_lora_adapter", {"lora_name": "asked-for"})
        return answer.status_code, answer.text

    for path in (
        str(places.outside),
        str(places.folder / "linked"),
        str(places.folder / ".." / "outside"),
        places.url.replace("/adapters", "/"),
        f"{places.url}/../far",
    ):
        code, text = await load(client, path)
        assert code == 400
        assert "not in --elora-adapter-sources" in text
    for path in (str(places.folder / "team" / "near"), f"{places.url}/far", adapters["qv-r4"]):
        code, text = await load(client, str(path))
        assert code == 200, text
