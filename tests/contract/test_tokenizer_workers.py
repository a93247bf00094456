"""Tokenizer workers of one server keep equal tables of adapters, with a router but no scheduler."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.utils import TypeBasedDispatcher

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.srt.lora.lora_registry import LoRARef

    from sglang_elora.srt.messages import WorkersCall
    from sglang_elora.srt.tokenizer import adapter_uses, shared_table, workers
    from sglang_elora.srt.tokenizer.workers import HostLock

FIRST = LoRARef(lora_id="id-first", lora_name="first", lora_path="/first")
LATER = LoRARef(lora_id="id-later", lora_name="later", lora_path="/later")


class Server:
    """Tokenizer workers, and what passes their messages on."""

    def __init__(self, num_workers: int) -> None:
        self.endpoint = f"ipc:///{uuid.uuid4().hex}"
        self.managers = [self._start(i) for i in range(num_workers)]

    def _start(self, number: int) -> Any:
        def send(message: Any) -> None:
            message.http_worker_ipc = str(number)
            self._pass_on(message)

        manager = SimpleNamespace(
            lora_ref_cache={"first": FIRST},
            pending_lora_unloads={},
            rid_to_state={},
            asyncio_tasks=set(),
            auto_create_handle_loop=lambda: None,
            _dispatch_to_scheduler=send,
            send_to_scheduler=SimpleNamespace(getsockopt_string=lambda _: self.endpoint),
            dispatcher=TypeBasedDispatcher([]),
            is_dead=False,
        )
        adapter_uses.attach(None, manager)
        manager.elora_workers.add_to(manager.dispatcher)
        return manager

    def _pass_on(self, message: Any) -> None:
        encoded = msgspec.msgpack.encode(message)
        is_call = isinstance(message, WorkersCall)
        for manager in self.managers if is_call else [self.managers[int(message.to)]]:
            if not manager.is_dead:
                manager.dispatcher(msgspec.msgpack.decode(encoded, type=type(message)))


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = SimpleNamespace(lora_paths=[FIRST])
    monkeypatch.setattr(adapter_uses, "get_lora", lambda: lora)
    monkeypatch.setattr(workers, "get_parallel", lambda: SimpleNamespace(dp_size=1))


def server_of(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> Server:
    serving = SimpleNamespace(tokenizer_worker_num=num_workers)
    monkeypatch.setattr(workers, "get_serving", lambda: serving)
    return Server(num_workers)


async def load(manager: Any, ref: LoRARef) -> None:
    """As SGLang's ``load_lora_adapter``."""
    async with manager.lora_update_lock:
        assert manager.lora_update_lock.locked()
        await manager.lora_registry.register(ref)
        manager.lora_ref_cache[ref.lora_name] = ref


async def unload(manager: Any, name: str) -> None:
    """As ``forget_path`` around SGLang's ``_unload_lora_adapter_locked``."""
    async with manager.lora_update_lock:
        known = manager.lora_ref_cache.pop(name, None)
    try:
        await unload_locked(manager, name)
    except ValueError:
        async with manager.lora_update_lock:
            manager.lora_ref_cache[name] = known
        raise


async def unload_locked(manager: Any, name: str) -> None:
    async with manager.lora_update_lock:
        adapter_id = manager.pending_lora_unloads.get(name)
        if adapter_id is None:
            adapter_id = await manager.lora_registry.unregister(name)
            manager.pending_lora_unloads[name] = adapter_id
        await manager.lora_registry.wait_for_unload(adapter_id)
        manager.pending_lora_unloads.pop(name)


def known(manager: Any) -> Sequence[dict[str, Any]]:
    return (
        manager.lora_registry.get_all_adapters(),
        manager.lora_ref_cache,
        manager.pending_lora_unloads,
    )


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_load_or_unload_through_one_is_known_to_all(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of(num_workers, monkeypatch)

    async def work() -> None:
        await load(server.managers[0], LATER)
        for manager in server.managers:
            assert known(manager)[:2] == ({"first": FIRST, "later": LATER},) * 2
            assert await manager.lora_registry.acquire(["later", None, "first"]) == [
                *("id-later", None, "id-first")
            ]
        await unload(server.managers[-1], "first")
        second = msgspec.structs.replace(FIRST, lora_id="id-second")
        await load(server.managers[0], second)
        for manager in server.managers:
            table = {"later": LATER, "first": second}
            assert known(manager) == (table, table, {})
            assert await manager.lora_registry.acquire("first") == "id-second"

    asyncio.run(work())


def test_unload_waits_for_requests_of_other_workers_and_stops_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = server_of(3, monkeypatch)
    one, other, third = server.managers

    async def work() -> None:
        adapter_id = await other.lora_registry.acquire("first")
        other.rid_to_state["r1"] = SimpleNamespace(obj=SimpleNamespace(lora_id=adapter_id))
        unloading = asyncio.create_task(unload(one, "first"))
        await asyncio.sleep(0.2)
        assert not unloading.done()
        for manager in server.managers:
            with pytest.raises(ValueError, match="not loaded"):
                await manager.lora_registry.acquire("first")
        del other.rid_to_state["r1"]
        await unloading
        assert [known(manager) for manager in (one, other, third)] == [({}, {}, {})] * 3

    asyncio.run(work())


def test_incomplete_unload_can_be_repeated_through_another_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = server_of(2, monkeypatch)
    one, other = server.managers
    monkeypatch.setattr(adapter_uses, "UNLOAD_PATIENCE_S", 0.1)

    async def work() -> None:
        one.rid_to_state["r1"] = SimpleNamespace(obj=SimpleNamespace(lora_id="id-first"))
        with pytest.raises(ValueError, match="r1"):
            await unload(other, "first")
        assert one.pending_lora_unloads == {"first": "id-first"}
        one.rid_to_state.clear()
        await unload(one, "first")
        assert known(one) == known(other) == ({}, {}, {})

    asyncio.run(work())


def test_one_worker_changes_the_table_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_of(3, monkeypatch)
    inside: list[int] = []

    async def change(number: int, manager: Any) -> None:
        for i in range(4):
            async with manager.lora_update_lock:
                inside.append(number)
                await asyncio.sleep(0.01)
                assert set(inside) == {number}
                inside.clear()
            await load(manager, LoRARef(lora_name=f"{number}-{i}", lora_path="/x"))

    async def work() -> None:
        await asyncio.gather(*(change(i, each) for i, each in enumerate(server.managers)))
        tables = [manager.lora_registry.get_all_adapters() for manager in server.managers]
        assert all(table == tables[0] for table in tables)
        assert len(tables[0]) == 13

    asyncio.run(work())


def test_dead_worker_delays_a_load_and_does_not_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_of(3, monkeypatch)
    one, other, dead = server.managers
    dead.is_dead = True
    ask = one.elora_workers.ask

    def impatient(do: str, data: Any, kind: Any) -> Any:
        return ask(do, data, kind, patience_s=0.1)

    monkeypatch.setattr(one.elora_workers, "ask", impatient)

    async def work() -> None:
        await load(one, LATER)
        assert "later" in known(other)[0]
        assert "later" not in known(dead)[0]
        dead.is_dead = False  # another process has taken its place

        async def loaded_in_scheduler() -> list[LoRARef]:
            return [LATER]

        async def join() -> None:
            dead.has_joined = True

        drain = SimpleNamespace(join=join)
        dead.elora = SimpleNamespace(loaded_in_scheduler=loaded_in_scheduler, drain=drain)
        await shared_table.use_loaded(dead)
        assert known(dead)[0] == {"later": LATER} and dead.has_joined
        assert known(dead)[1].keys() == {"first", "later"}  # the others know both

    asyncio.run(work())


HOLDER = """
import sys
from types import SimpleNamespace
from sglang_elora.srt.tokenizer.workers import HostLock
lock = HostLock(SimpleNamespace(send_to_scheduler=SimpleNamespace(
    getsockopt_string=lambda _: sys.argv[1])), "x")
print(lock.try_acquire(), flush=True)
sys.stdin.read()
"""


def test_lock_of_a_process_that_was_killed_is_free() -> None:
    endpoint = f"ipc:///{uuid.uuid4().hex}"
    manager: Any = SimpleNamespace(
        send_to_scheduler=SimpleNamespace(getsockopt_string=lambda _: endpoint)
    )
    lock = HostLock(manager, "x")
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, endpoint]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline().split()[-1] == "True"
            assert not lock.try_acquire()
            other = HostLock(manager, "other")
            assert other.try_acquire()
            other.release()
        finally:
            holder.kill()
    deadline_s = time.monotonic() + 10
    while not lock.try_acquire():
        assert time.monotonic() < deadline_s
    lock.release()
    assert lock.try_acquire()
    lock.release()
