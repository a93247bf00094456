"""Keeps the tables of adapters of all tokenizer workers equal (``--tokenizer-worker-num``).

SGLang has a table per worker, so an adapter loaded through one is unknown to the others. Here one
load or unload runs at a time, and it is answered after the others have heard of it. A worker that
starts asks the scheduler which adapters are loaded before it serves.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
from sglang.srt.lora.lora_registry import LoRARef

from sglang_elora.srt.tokenizer.adapter_sources import keep_loaded
from sglang_elora.srt.tokenizer.workers import HostLock, Workers

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


class TableChange(msgspec.Struct, frozen=True):
    """What a load or an unload changed in a worker's tables.

    Attributes:
        loaded: Adapters that are loaded now.
        unloaded: Names of adapters that no longer are.
        known: Adapters that SGLang loads again when a request names them.
        forgotten: Names of those that it no longer does.
        pending: Ids of adapters whose unload is not complete, by name; all of them.
    """

    loaded: list[LoRARef]
    unloaded: list[str]
    known: list[LoRARef]
    forgotten: list[str]
    pending: dict[str, str]


class TableLock:
    """SGLang's lock of loads and unloads, held by one worker at a time. On its release the others
    hear what changed.

    Args:
        manager: Has the tables.
        workers: The others.
    """

    def __init__(self, manager: TokenizerManager, workers: Workers) -> None:
        self._manager = manager
        self._workers = workers
        self._own = asyncio.Lock()
        self._shared: HostLock | None = None
        self._before: tuple[dict[str, LoRARef], dict[str, LoRARef], dict[str, str]] = ({}, {}, {})
        workers.handle("table", TableChange, self._apply)
        workers.handle("known", type(None), self._known)

    def locked(self) -> bool:
        """Whether this worker holds it."""
        return self._own.locked()

    async def __aenter__(self) -> None:
        await self._own.acquire()
        try:
            if self._workers.num_others:
                if self._shared is None:
                    self._shared = HostLock(self._manager, "adapters")
                await self._shared.acquire()
                self._before = self._tables()
        except BaseException:
            self._own.release()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._shared is not None:
                try:
                    await self._tell_change()
                finally:
                    self._shared.release()
        finally:
            self._own.release()

    def _tables(self) -> tuple[dict[str, LoRARef], dict[str, LoRARef], dict[str, str]]:
        manager = self._manager
        return (
            manager.lora_registry.get_all_adapters(),
            dict(manager.lora_ref_cache),
            dict(manager.pending_lora_unloads),
        )

    async def _tell_change(self) -> None:
        (loaded, known, pending), now = self._before, self._tables()
        if now == (loaded, known, pending):
            return
        change = TableChange(
            loaded=_added(loaded, now[0]),
            unloaded=_removed(loaded, now[0]),
            known=_added(known, now[1]),
            forgotten=_removed(known, now[1]),
            pending=now[2],
        )
        await self._workers.ask("table", change, type(None))

    async def _apply(self, change: TableChange) -> None:
        manager = self._manager
        for name in change.unloaded:
            manager.lora_registry.drop(name)
        for ref in change.loaded:
            manager.lora_registry.add(ref)
        for name in change.forgotten:
            manager.lora_ref_cache.pop(name, None)
        manager.lora_ref_cache.update({ref.lora_name or "": ref for ref in change.known})
        manager.pending_lora_unloads.clear()
        manager.pending_lora_unloads.update(change.pending)
        keep_loaded(manager)

    async def _known(self, _: None) -> list[LoRARef]:
        return list(self._manager.lora_ref_cache.values())


def _added(before: dict[str, LoRARef], now: dict[str, LoRARef]) -> list[LoRARef]:
    return [ref for name, ref in now.items() if before.get(name) != ref]


def _removed(before: dict[str, LoRARef], now: dict[str, LoRARef]) -> list[str]:
    return [name for name in before if name not in now]


async def use_loaded(manager: TokenizerManager) -> None:
    """Set a starting worker's tables to what is loaded in the scheduler and known to the others,
    which may have changed since the start of the server; drain if they do.

    Raises:
        NoAnswer: The scheduler did not answer in time.
    """
    control, registry = manager.elora, manager.lora_registry
    loaded = {ref.lora_name or "": ref for ref in await control.loaded_in_scheduler()}
    for name in registry.get_all_adapters().keys() - loaded.keys():
        registry.drop(name)
        manager.lora_ref_cache.pop(name, None)
    for name, ref in loaded.items():
        registry.add(ref)
        manager.lora_ref_cache[name] = ref
    for refs in await manager.elora_workers.ask("known", None, list[LoRARef]):
        manager.lora_ref_cache.update({ref.lora_name or "": ref for ref in refs})
    keep_loaded(manager)
    await control.drain.join()
