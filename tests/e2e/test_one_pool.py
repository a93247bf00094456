"""Adapters and KV in one small pool: admission, refusals, pins, flushes, versions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec, make_adapters
from sglang_elora.testbed.server import ServerProcess
from tests.harness.adapter_specs import NAMES, SPECS
from tests.harness.client import Client
from tests.harness.pressure import adapter_slots
from tests.harness.reference import Reference
from tests.harness.server_flags import HOST_TIER, server_flags

POOL_SLOTS = 2600
LARGEST = "all-r64"
SLOTS = {spec.name: adapter_slots(spec) for spec in SPECS}


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[ServerProcess]:
    """A pool that holds the largest adapter and not much more, or half of all others.

    The host tier is on, and KV is copied there as it is computed: unloading has both to clear.
    """
    assert SLOTS[LARGEST] < POOL_SLOTS < sum(SLOTS.values()) / 2
    flags = [*server_flags(checkpoint, adapters), "--max-total-tokens", str(POOL_SLOTS)]
    flags += [*HOST_TIER, "write_through"]
    log_path = logs / "one-pool.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        yield server
        log = log_path.read_text()  # before the end: libraries report leaks of their own at exit
        assert "leak" not in log.lower() and "AssertionError" not in log


async def statistics(client: Client) -> dict[str, int]:
    info = (await client.get("/server_info")).json()
    found: dict[str, int] = info["internal_states"][0]["elora"]
    return found


async def load(client: Client, name: str, path: Path, **extra: Any) -> Any:
    return await client.post(
        "/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **extra}
    )


async def unload(client: Client, name: str) -> None:
    answer = await client.post("/unload_lora_adapter", {"lora_name": name})
    assert answer.status_code == 200, answer.text


async def test_idle_server_reads_all_adapter_files_into_host_memory(client: Client) -> None:
    """Files are read before any request, into host memory only; this test must run first."""
    found = await statistics(client)
    for _ in range(200):
        if found["adapters_on_host"] == len(NAMES):
            break
        await asyncio.sleep(0.1)
        found = await statistics(client)
    assert found["adapters_on_host"] == found["adapter_files_read"] == len(NAMES)
    assert found["adapter_loads"] == 0


async def test_adapters_that_do_not_fit_together_are_served_in_turns(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """All concurrently, 3 prompts each; every request completes with the right answer."""
    asked = [(name, prompt) for prompt in prompts for name in (*NAMES, None)]
    answers = await asyncio.gather(*(client.generate(*request) for request in asked))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(name, prompt), name
    found = await statistics(client)
    assert found["adapter_loads"] >= len(NAMES) and found["adapter_evictions"] > 0
    assert found["kv_tokens_invalid"] == 0 and found["checks"] > 0
    assert found["adapter_slots"] + found["kv_tokens_device"] <= POOL_SLOTS


async def test_batch_holds_all_adapters_that_fit(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    small = sorted(NAMES, key=SLOTS.__getitem__)[:9]
    assert sum(SLOTS[name] for name in small) < POOL_SLOTS - 900
    for name in small:  # all are resident, and answers overlap
        await client.generate(name, prompts[0], num_tokens=1)
    for _ in range(10):  # on a busy machine some arrive when others have their answer
        answers = await asyncio.gather(
            *(client.generate(name, prompts[0], num_tokens=64) for name in small)
        )
        for name, answer in zip(small, answers, strict=True):
            assert list(answer.token_ids) == reference.generate(name, prompts[0], 64)
        if (most := (await statistics(client))["max_adapters_in_batch"]) >= len(small):
            break
    assert most >= len(small)


async def test_adapter_larger_than_the_pool_is_refused_with_its_size(
    client: Client,
    checkpoint: Path,
    models: Path,
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    spec = AdapterSpec("huge", rank=128, alpha=8, target_modules=ALL_LINEAR, seed=20)
    path = make_adapters(checkpoint, models / "huge", [spec])["huge"]
    refused = await load(client, "huge", path)
    assert refused.status_code == 400
    message = refused.json()["error_message"]
    assert f"{adapter_slots(spec)} slots" in message and str(POOL_SLOTS) in message
    assert "--max-total-tokens" in message
    unknown = await client.post("/generate", {"text": "Hello", "lora_path": "huge"})
    assert unknown.status_code == 400
    answer = await client.generate(LARGEST, prompts[0])
    assert list(answer.token_ids) == reference.generate(LARGEST, prompts[0])


async def test_prompt_that_does_not_fit_with_its_adapter_is_refused(
    client: Client, reference: Reference
) -> None:
    prompt = list(range(3, 3 + POOL_SLOTS - SLOTS[LARGEST]))
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    refused = await client.post("/generate", {**body, "lora_path": LARGEST})
    assert refused.status_code == 400
    assert f"({SLOTS[LARGEST]} slots)" in refused.text and f"{len(prompt)} tokens" in refused.text
    answer = await client.generate(None, prompt, num_tokens=4)
    assert list(answer.token_ids) == reference.generate(None, prompt, 4)


async def test_answer_length_is_clipped_to_the_slots_left_by_the_adapter(client: Client) -> None:
    answer = await client.generate(LARGEST, range(3, 103), num_tokens=POOL_SLOTS)
    room = POOL_SLOTS - SLOTS[LARGEST] - 100
    assert room - 8 < len(answer.token_ids) < room


async def test_cold_adapter_request_is_not_starved(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """Base-model requests keep the pool full; the adapter's request still runs."""
    rng = random.Random(0)
    await client.post("/flush_cache?timeout=30", {})
    passed, done = 0, asyncio.Event()

    async def keep_busy() -> None:
        nonlocal passed
        while not done.is_set():
            prompt = [rng.randrange(3, 2000) for _ in range(150)]
            await client.generate(None, prompt, num_tokens=32)
            passed += 1

    others = [asyncio.create_task(keep_busy()) for _ in range(12)]
    while passed < 12:
        await asyncio.sleep(0.05)
    before = passed
    answer = await client.generate(LARGEST, prompts[0])
    overtaken = passed - before
    done.set()
    await asyncio.gather(*others)
    assert list(answer.token_ids) == reference.generate(LARGEST, prompts[0])
    assert overtaken <= 64 + 2 * 12


async def test_adapters_are_servable_after_a_flush(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    names = ("qv-r4", "attention-r8", None)
    for _ in range(3):
        for name in names:
            for expect_cached in (False, True):
                answer = await client.generate(name, prompts[1])
                assert list(answer.token_ids) == reference.generate(name, prompts[1])
                assert (answer.cached_tokens > 0) == expect_cached
        assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    found = await statistics(client)
    assert (found["adapter_slots"], found["kv_tokens_device"]) == (0, 0)


async def test_adapters_are_servable_after_a_weight_update(
    client: Client, checkpoint: Path, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    await client.generate("all-r4", prompts[1])
    await asyncio.sleep(0.2)  # SGLang ends if its last batch has not been looked at yet
    updated = await client.post("/update_weights_from_disk", {"model_path": str(checkpoint)})
    assert updated.json()["success"], updated.text
    answer = await client.generate("all-r4", prompts[1])
    assert answer.cached_tokens == 0
    assert list(answer.token_ids) == reference.generate("all-r4", prompts[1])


async def test_pinned_adapter_stays_resident_under_load(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    loaded = await load(client, "pinned", adapters["attention-r8"], pinned=True)
    assert loaded.status_code == 200, loaded.text
    await client.generate("pinned", prompts[0])
    for name in NAMES:  # more than the pool holds; the largest one does not fit any more
        if SLOTS[name] + SLOTS["attention-r8"] < POOL_SLOTS - 200:
            await client.generate(name, prompts[1])
    before = await statistics(client)
    answer = await client.generate("pinned", prompts[2])
    assert list(answer.token_ids) == reference.generate("attention-r8", prompts[2])
    after = await statistics(client)
    assert after["adapter_loads"] == before["adapter_loads"]
    refused = await load(client, "pinned-too", adapters[LARGEST], pinned=True)
    assert refused.status_code == 400 and "cannot be pinned" in refused.text
    await unload(client, "pinned")


async def test_reloaded_name_serves_the_new_weights(
    client: Client, checkpoint: Path, models: Path, prompts: Sequence[list[int]]
) -> None:
    """Three versions under one name; old KV is never used, requests in flight end consistently."""
    specs = [AdapterSpec(f"v{i}", 8, 16, ALL_LINEAR, seed=30 + i) for i in range(3)]
    versions = make_adapters(checkpoint, models / "versions", specs)
    truth = Reference(checkpoint, versions)
    for version in ("v0", "v1", "v2", "v0"):
        assert (await load(client, "name", versions[version])).status_code == 200
        for expect_cached in (False, True):
            answer = await client.generate("name", prompts[1])
            assert list(answer.token_ids) == truth.generate(version, prompts[1])
            assert (answer.cached_tokens > 0) == expect_cached
        asked = [(name, prompt) for prompt in prompts for name in ("name", None)]
        in_flight = await asyncio.gather(
            *(client.begin(*request, num_tokens=64) for request in asked)
        )
        await unload(client, "name")  # waits for its requests
        for (name, prompt), answer in zip(asked, in_flight, strict=True):
            weights = None if name is None else version
            assert list((await answer).token_ids) == truth.generate(weights, prompt, 64)


async def test_unload_frees_device_and_host_memory(
    client: Client, adapters: dict[str, Path], prompts: Sequence[list[int]]
) -> None:
    await client.post("/flush_cache?timeout=30", {})
    assert (await load(client, "leaving", adapters["qv-r4"])).status_code == 200
    for _ in range(2):
        await client.generate("leaving", prompts[1])
    held = await statistics(client)
    assert held["adapter_slots"] == SLOTS["qv-r4"]
    assert min(held["kv_tokens_device"], held["kv_tokens_host"]) > len(prompts[1])
    await unload(client, "leaving")
    left = await statistics(client)
    assert left["adapter_slots"] == left["kv_tokens_device"] == left["kv_tokens_host"] == 0


async def test_server_survives_200_random_operations(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    """Load, unload, generate and flush in any order, four at a time, with all checks on."""
    rng = random.Random(1)
    loaded: dict[str, str] = {}  # name on the server -> name of its weights

    async def generate(client: Client) -> None:
        name = rng.choice([*loaded, None]) if loaded else None
        weights = None if name is None else loaded[name]
        prompt = rng.choice(prompts)
        answer = await client.generate(name, prompt, num_tokens=8)
        assert list(answer.token_ids) == reference.generate(weights, prompt, 8), (name, weights)

    for step in range(200):
        kind = rng.choices(["generate", "load", "unload", "flush"], [60, 20, 15, 5])[0]
        if kind == "generate":
            await asyncio.gather(*(generate(client) for _ in range(4)))
        elif kind == "load" and len(loaded) < 6:
            weights = rng.choice(NAMES)
            answer = await load(client, f"random-{step}", adapters[weights])
            assert answer.status_code == 200, answer.text
            loaded[f"random-{step}"] = weights
        elif kind == "unload" and loaded:
            name = rng.choice(list(loaded))
            loaded.pop(name)
            await unload(client, name)
        elif kind == "flush":
            assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    for name in loaded:
        await unload(client, name)
    assert (await statistics(client))["kv_tokens_invalid"] == 0


async def test_announced_turn_loads_back_the_kv_of_its_session(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    """The pool is too full for prefetching without a hint."""
    name, prompt = "all-r4", prompts[1]
    assert SLOTS[LARGEST] > 0.7 * POOL_SLOTS > SLOTS[name] + len(prompt)

    async def kv_tokens(client: Client) -> tuple[int, int]:
        (row,) = (await client.get(f"/elora/state?lora_name={name}")).json()["adapters"]
        return row["kv_tokens_device"], row["kv_tokens_host"]

    async def until_on_device(client: Client, num_tokens: int) -> None:
        for _ in range(100):
            if (await kv_tokens(client))[0] >= num_tokens:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(await kv_tokens(client))

    assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    await client.generate(LARGEST, prompts[0])
    await client.generate(name, prompt, session_id="talk")
    await client.generate(name, prompts[0])
    for _ in range(100):  # still in use for a moment after its last answer
        evicted = await client.post("/elora/evict", {"lora_name": name})
        if evicted.status_code == 200:
            break
        await asyncio.sleep(0.05)
    assert evicted.status_code == 200, evicted.text
    for _ in range(100):
        if (await kv_tokens(client))[0] == 0:
            break
        await asyncio.sleep(0.05)
    on_device, on_host = await kv_tokens(client)
    assert on_device == 0 and on_host >= len(prompt)
    await client.generate(name, prompts[2])  # the adapter is resident now, its KV is not
    assert (await kv_tokens(client))[0] < len(prompt)
    answer = await client.post("/elora/prefetch", {"session_id": "talk"})
    assert answer.status_code == 200 and answer.json()["tiers"] == {}
    await until_on_device(client, len(prompt))
    again = await client.generate(name, prompt, session_id="talk")
    assert list(again.token_ids) == reference.generate(name, prompt)
    assert again.cached_tokens == len(prompt) - 1
    refused = await client.post("/elora/prefetch", {"session_id": "nobody's"})
    assert refused.status_code == 400
    assert refused.json()["error_message"] == "no session of this name is alive"
    assert (await client.post("/close_session", {"session_id": "talk"})).status_code == 200


async def test_evicted_adapters_and_kv_are_loaded_back_into_free_slots(
    client: Client,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    """The largest adapter evicts chats and is unloaded: adapters and KV are prefetched again."""
    prompt, names = prompts[1], ("attention-r8", "all-r4", "rslora-r8", "qv-r4")
    num_slots = sum(SLOTS[name] + len(prompt) for name in names)
    assert POOL_SLOTS - SLOTS[LARGEST] < num_slots < 0.7 * POOL_SLOTS
    assert (await client.post("/flush_cache?timeout=30", {})).status_code == 200
    for name in (*names, LARGEST):
        await client.generate(name, prompt)
    before = await statistics(client)
    assert before["adapters_resident"] < len(names)
    await unload(client, LARGEST)
    assert (await load(client, LARGEST, adapters[LARGEST])).status_code == 200
    for _ in range(100):
        after = await statistics(client)
        if after["kv_tokens_device"] >= len(names) * len(prompt):
            break
        await asyncio.sleep(0.1)
    assert after["adapters_resident"] == len(names)
    assert after["adapter_evictions.capacity"] == before["adapter_evictions.capacity"]
    assert after["prefetched_slots"] > before["prefetched_slots"]
    for name in names:
        answer = await client.generate(name, prompt)
        assert list(answer.token_ids) == reference.generate(name, prompt)
        assert answer.cached_tokens == len(prompt) - 1
    used = (await statistics(client))["prefetched_slots_used"] - before["prefetched_slots_used"]
    assert used > len(prompt)
