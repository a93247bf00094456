"""2,000 adapters beyond host memory: files read again, missing, changed; copies failing."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import SPECS
from tests.harness.client import Client
from tests.harness.plugin_packages import install_plugin
from tests.harness.pressure import adapter_slots
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

WEIGHTS = "adapter_model.safetensors"
NAMES = ("qv-r4", "attention-r8", "attention-r24", "mlp-r24", "all-r4", "rslora-r8")
"""Adapters whose folders this server owns."""

TWIN = "qv-r4-b"
POOL_SLOTS = 1000
NUM_REGISTERED = 2000


@pytest.fixture(scope="module")
def folders(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies that tests may delete and change."""
    root = tmp_path_factory.mktemp("own-adapters")
    own = {name: Path(shutil.copytree(adapters[name], root / name)) for name in NAMES}
    own[TWIN] = Path(shutil.copytree(adapters["qv-r4"], root / TWIN))
    return own


@pytest.fixture(scope="module")
def fail_copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("switch") / "fail"


@pytest.fixture(scope="module")
def server(
    checkpoint: Path,
    adapters: dict[str, Path],
    folders: dict[str, Path],
    fail_copies: Path,
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """A server without a host tier, a pool for 2 or 3 adapters, and 2,000 unrequested ones."""
    slots = [adapter_slots(spec) for spec in SPECS if spec.name in NAMES]
    assert max(slots) < POOL_SLOTS / 2 < POOL_SLOTS < sum(slots)
    plugins = tmp_path_factory.mktemp("plugins")
    install_plugin(plugins, "failing_copies")
    links = tmp_path_factory.mktemp("spare")
    given = {f"spare-{i}": links / str(i) for i in range(NUM_REGISTERED)}
    for i, link in enumerate(given.values()):
        link.symlink_to(adapters[NAMES[i % len(NAMES)]])
    flags = [*server_flags(checkpoint, {**folders, **given})]
    flags += ["--max-total-tokens", str(POOL_SLOTS), "--elora-host-gb", "0"]
    paths = (str(plugins), os.environ.get("PYTHONPATH"))
    env = {"FAIL_COPIES": str(fail_copies), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log_path = logs / "host-tier.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path, env=env) as server:
        yield server
        log = log_path.read_text()
        assert "leak" not in log.lower() and "AssertionError" not in log


async def statistics(client: Client) -> dict[str, int]:
    info = (await client.get("/server_info")).json()
    found: dict[str, int] = info["internal_states"][0]["elora"]
    return found


async def ask(client: Client, name: str, prompt: Sequence[int]) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "lora_path": name}
    return await client.post("/generate", body)


async def drive_out(client: Client, name: str, prompt: Sequence[int]) -> None:
    """Use other adapters until this one is evicted from the device."""
    others = [other for other in NAMES if other != name]
    before = (await statistics(client))["adapter_evictions"]
    for _ in range(3):
        for other in others:
            assert (await ask(client, other, prompt)).status_code == 200
    assert (await statistics(client))["adapter_evictions"] > before + len(others)


async def test_no_file_is_read_for_unrequested_adapters(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    models = (await client.get("/v1/models")).json()["data"]
    assert len(models) > NUM_REGISTERED
    before = await statistics(client)
    answer = await client.generate("spare-1999", prompts[0])
    after = await statistics(client)
    assert after["adapter_files_read"] == before["adapter_files_read"] + 1
    assert after["adapters_resident"] <= 3
    expected = reference.generate(NAMES[1999 % len(NAMES)], prompts[0])
    assert list(answer.token_ids) == expected


async def test_adapters_read_again_give_the_same_output(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """All concurrently, repeatedly; the device holds few adapters and the host none."""
    for _ in range(3):
        answers = await asyncio.gather(*(client.generate(n, prompts[0]) for n in NAMES))
        for name, answer in zip(NAMES, answers, strict=True):
            assert list(answer.token_ids) == reference.generate(name, prompts[0]), name
    after = await statistics(client)
    assert after["adapter_files_read"] > 2 * len(NAMES)
    assert after["adapters_on_host"] <= 1 and after["kv_tokens_invalid"] == 0


async def test_missing_adapter_file_fails_only_its_requests(
    client: Client,
    folders: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    await client.generate("mlp-r24", prompts[0])
    await drive_out(client, "mlp-r24", prompts[1])
    weights = folders["mlp-r24"] / WEIGHTS
    weights.rename(weights.with_suffix(".away"))
    failing = [ask(client, "mlp-r24", prompts[0]) for _ in range(3)]
    *failed, good = await asyncio.gather(*failing, ask(client, "qv-r4", prompts[0]))
    for answer in failed:
        assert answer.status_code == 503, answer.text
        assert "LoRA adapter 'mlp-r24' cannot be loaded" in answer.text
    assert good.json()["output_ids"] == reference.generate("qv-r4", prompts[0])[:16]
    weights.with_suffix(".away").rename(weights)
    answer = await client.generate("mlp-r24", prompts[0])
    assert list(answer.token_ids) == reference.generate("mlp-r24", prompts[0])
    assert (await statistics(client))["requests_failed"] >= 3


async def test_changed_adapter_file_is_not_mixed_with_cached_kv(
    client: Client,
    adapters: dict[str, Path],
    folders: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    """Same shapes, other weights: KV of the old ones may be cached under this adapter."""
    old = await client.generate(TWIN, prompts[0])
    assert list(old.token_ids) == reference.generate("qv-r4", prompts[0])
    await drive_out(client, TWIN, prompts[1])
    folder = folders[TWIN]
    shutil.rmtree(folder)
    shutil.copytree(adapters["attention-r8"], folder)
    other_shape = await ask(client, TWIN, prompts[0])
    assert other_shape.status_code == 503, other_shape.text
    shutil.copytree(adapters["qv-r4"], folder, dirs_exist_ok=True)
    scale_weights(folder / WEIGHTS, 0.5)
    changed = await ask(client, TWIN, prompts[0])
    assert changed.status_code == 503, changed.text
    assert "unload it and load it again" in changed.text
    assert (await client.post("/unload_lora_adapter", {"lora_name": TWIN})).status_code == 200
    body = {"lora_name": TWIN, "lora_path": str(folder)}
    assert (await client.post("/load_lora_adapter", body)).status_code == 200
    new = await client.generate(TWIN, prompts[0])
    assert new.cached_tokens == 0 and new.token_ids != old.token_ids


async def test_failed_copy_leaves_the_pool_consistent(
    client: Client,
    fail_copies: Path,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    await drive_out(client, "all-r4", prompts[1])
    before = await statistics(client)
    fail_copies.touch()
    failed = await asyncio.gather(*(ask(client, "all-r4", prompts[0]) for _ in range(3)))
    fail_copies.unlink()
    for answer in failed:
        assert answer.status_code == 503, answer.text
        assert "'all-r4' cannot be loaded: the link broke" in answer.text
    after = await statistics(client)
    assert after["adapter_copies_failed"] > before["adapter_copies_failed"]
    answer = await client.generate("all-r4", prompts[0])
    assert list(answer.token_ids) == reference.generate("all-r4", prompts[0])
    assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    empty = await statistics(client)
    assert empty["adapters_resident"] == empty["kv_tokens_device"] == 0


async def test_aborted_requests_during_loads_leave_the_pool_balanced(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """Requests are aborted while their adapters load; the pool stays balanced."""
    for i in range(20):
        name = NAMES[i % len(NAMES)]
        task = asyncio.create_task(ask(client, name, [*prompts[0], i + 3]))
        await asyncio.sleep(0.004 * (i % 5))
        task.cancel()
    # It flushes when nothing runs or waits.
    assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    answer = await client.generate("attention-r24", prompts[0])
    assert list(answer.token_ids) == reference.generate("attention-r24", prompts[0])


def scale_weights(path: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: factor * tensor for name, tensor in load_file(path).items()}, path)
