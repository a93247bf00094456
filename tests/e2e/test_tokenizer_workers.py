"""A server with several tokenizer workers: what one is told, all of them know."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.reference import Reference
from tests.harness.server_flags import server_flags

NUM_WORKERS = 3
SERVABLE_S = 90.0  # at most, until a worker that was killed has been started again
GIVEN = ("all-r64", "qv-r4", "mlp-r24")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, adapters: dict[str, Path], watched: Path, logs: Path
) -> Iterator[ServerProcess]:
    flags = [
        *("--elora", "--elora-check", "--elora-adapter-dir", str(watched), "--enable-metrics"),
        *("--tokenizer-worker-num", str(NUM_WORKERS)),
        *server_flags(checkpoint, {name: adapters[name] for name in GIVEN}),
        *("--max-lora-rank", "64"),
    ]
    env = {
        "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
        # A worker that clients_of stops for longer than this is killed as hung.
        "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "120",
    }
    with ServerProcess(flags, log_path=logs / "workers.log", env=env) as server:
        yield server


def worker_processes(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children()
    return [child for child in children if "tokenizer_worker" in " ".join(child.cmdline())]


@asynccontextmanager
async def clients_of(server: ServerProcess) -> AsyncIterator[list[Client]]:
    """A client per worker, with a connection that this worker accepted, as the others stood still.
    Each must have one request at a time."""
    started_s = time.monotonic()
    while len(processes := worker_processes(server)) < NUM_WORKERS:
        assert time.monotonic() < started_s + SERVABLE_S, processes
        await asyncio.sleep(0.1)
    clients = [Client(server.url) for _ in processes]
    try:
        for process, client in zip(processes, clients, strict=True):
            others = [other for other in processes if other != process]
            try:
                for other in others:
                    other.suspend()
                assert (await client.get("/server_info")).status_code == 200
            finally:
                for other in others:
                    other.resume()
        yield clients
    finally:
        for client in clients:
            await client.close()


@pytest.fixture
async def clients(server: ServerProcess) -> AsyncIterator[list[Client]]:
    async with clients_of(server) as clients:
        yield clients


async def served(client: Client, name: str, prompt: Sequence[int]) -> list[int] | None:
    """The answer's tokens, None if no such adapter is loaded."""
    body = {
        "input_ids": list(prompt),
        "lora_path": name,
        "sampling_params": {"max_new_tokens": 32, "temperature": 0},
    }
    response = await client.post("/generate", body)
    listed = {card["id"] for card in (await client.get("/v1/models")).json()["data"]}
    assert (name in listed) == (response.status_code == 200), (listed, response.text)
    if response.status_code == 400:
        assert "load" in response.text
        return None
    tokens: list[int] = response.json()["output_ids"]
    return tokens


async def test_adapter_loaded_through_one_worker_is_served_by_all(
    clients: list[Client],
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    for i, source in enumerate(("attention-r8", "rslora-r8", "all-r4")):  # same name, other weights
        one, other = clients[i], clients[(i + 1) % NUM_WORKERS]
        body = {"lora_name": "tenant", "lora_path": str(adapters[source])}
        loaded = await one.post("/load_lora_adapter", body)
        assert loaded.status_code == 200, loaded.text
        expected = reference.generate(source, prompts[0])
        for client in clients:
            assert await served(client, "tenant", prompts[0]) == expected
        again = await other.post("/load_lora_adapter", body)
        assert again.status_code == 400
        assert "already loaded" in again.text
        unloaded = await other.post("/unload_lora_adapter", {"lora_name": "tenant"})
        assert unloaded.status_code == 200, unloaded.text
        for client in clients:
            assert await served(client, "tenant", prompts[0]) is None


async def test_unload_waits_for_a_request_of_another_worker(
    clients: list[Client], reference: Reference, prompts: Sequence[list[int]]
) -> None:
    running = await clients[0].begin("mlp-r24", prompts[0], num_tokens=300)
    body = {"lora_name": "mlp-r24"}
    unloading = asyncio.create_task(clients[1].post("/unload_lora_adapter", body))
    await asyncio.sleep(0.5)
    assert not unloading.done()
    assert await served(clients[2], "mlp-r24", prompts[0]) is None  # it does not load it again
    unloaded = await unloading
    assert unloaded.status_code == 200, unloaded.text
    answer = await running
    assert await served(clients[0], "mlp-r24", prompts[0]) is None
    assert list(answer.token_ids) == reference.generate("mlp-r24", prompts[0], num_tokens=300)


async def test_one_adapter_named_by_all_at_once_is_loaded_once(
    clients: list[Client],
    server: ServerProcess,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    body = {"lora_name": "race", "lora_path": str(adapters["attention-r24"])}
    answers = await asyncio.gather(*(each.post("/load_lora_adapter", body) for each in clients))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400]
    expected = reference.generate("attention-r24", prompts[1])
    tokens = await asyncio.gather(*(served(each, "race", prompts[1]) for each in clients))
    assert tokens == [expected] * NUM_WORKERS


async def test_pins_and_their_leases_are_those_of_all_workers(clients: list[Client]) -> None:
    one, other, third = clients

    async def lease_of(client: Client) -> float | None:
        state = (await client.get("/elora/state")).json()
        rows = {row["lora_name"]: row for row in state["adapters"]}
        lease_s: float | None = rows["qv-r4"]["lease_s"]
        assert rows["qv-r4"]["pinned"] == (lease_s is not None)
        return lease_s

    pin = {"lora_name": "qv-r4", "lease_s": 300}
    assert (await one.post("/elora/pin", pin)).status_code == 200
    for client in clients:
        left_s = await lease_of(client)
        assert left_s is not None and 200 < left_s <= 300
    assert (await other.post("/elora/pin", {**pin, "lease_s": 2000})).status_code == 200
    left_s = await lease_of(third)
    assert left_s is not None and left_s > 1000  # the first one ended with it
    assert (await third.post("/elora/unpin", {"lora_name": "qv-r4"})).status_code == 200
    assert [await lease_of(client) for client in clients] == [None] * NUM_WORKERS


async def test_metrics_and_hints_are_the_same_from_each_worker(
    clients: list[Client], prompts: Sequence[list[int]]
) -> None:
    for client in clients:
        await client.complete("demo:qv-r4", "Good morning", num_tokens=2)
    shown = []
    for client in clients:
        text = (await client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("sglang:elora_hints_total")]
        shown.append(sorted(lines))
    assert shown[0]
    assert shown == [shown[0]] * NUM_WORKERS


async def test_adapter_dir_is_watched_by_one_worker_for_all(
    clients: list[Client],
    server: ServerProcess,
    watched: Path,
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    copied = shutil.copytree(adapters["all-r4"], watched / ".new")
    copied.rename(watched / "found")
    deadline_s = time.monotonic() + SERVABLE_S
    while await served(clients[0], "found", prompts[0]) is None:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.2)
    expected = reference.generate("all-r4", prompts[0])
    for client in clients:
        assert await served(client, "found", prompts[0]) == expected
    log = server.log_path.read_text()
    assert log.count("adapter 'found' of") == 1


async def test_worker_that_was_started_again_knows_loads_and_a_drain_meanwhile(
    server: ServerProcess,
    clients: list[Client],
    adapters: dict[str, Path],
    reference: Reference,
    prompts: Sequence[list[int]],
) -> None:
    body = {"lora_name": "kept", "lora_path": str(adapters["rslora-r8"])}
    assert (await clients[0].post("/load_lora_adapter", body)).status_code == 200
    unloaded = await clients[0].post("/unload_lora_adapter", {"lora_name": "all-r64"})
    assert unloaded.status_code == 200, unloaded.text
    assert (await clients[0].post("/elora/drain", {})).status_code == 200
    killed = worker_processes(server)[0]
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    expected = reference.generate("rslora-r8", prompts[2])
    async with clients_of(server) as restarted:
        for client in restarted:
            assert (await client.get("/ready")).status_code == 503  # it drains, too
        assert (await restarted[0]._http.delete("/elora/drain")).status_code == 200
        for client in restarted:
            assert await served(client, "kept", prompts[2]) == expected
            assert await served(client, "all-r64", prompts[2]) is None
            state = (await client.get("/elora/state")).json()
            assert {row["lora_name"] for row in state["adapters"]} >= {"kept", "qv-r4"}
        gone = await restarted[-1].post("/unload_lora_adapter", {"lora_name": "kept"})
        assert gone.status_code == 200, gone.text
    assert server.returncode is None


async def test_drain_order_to_one_worker_reaches_all(
    server: ServerProcess, prompts: Sequence[list[int]]
) -> None:
    async with clients_of(server) as clients:
        first, *others = clients
        await others[0].generate("qv-r4", prompts[0], session_id="open")
        running = await others[1].begin("qv-r4", prompts[1], num_tokens=200, session_id="running")
        begun = (await first.post("/elora/drain", {"refuse_after_s": 0})).json()
        assert begun["refusing"] and begun["num_requests"] == 1 and begun["open_sessions"] == 2
        await running
        for client in clients:
            assert (await client.get("/ready")).status_code == 503
            for session, status in (("open", 200), ("running", 200), ("new", 503)):
                body = {"input_ids": prompts[0], "session_id": session}
                assert (await client.post("/generate", body)).status_code == status, session
        assert not (await clients[-1]._http.delete("/elora/drain")).json()["draining"]
        for client in clients:
            assert (await client.get("/ready")).status_code == 200
