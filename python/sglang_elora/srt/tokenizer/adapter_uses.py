"""Determines the requests that use an adapter, so that an unload waits exactly for these.

SGLang increments a counter when a request's adapter is resolved, and decrements it when the answer
is complete. It is not decremented for requests that end otherwise (refused after that point,
aborted in the queue, disconnected), and it is decremented without an increment for the copies made
for ``n > 1``. So this module uses SGLang's table of unfinished requests instead
(``TokenizerManager.rid_to_state``), which has each request's adapter.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry
from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput, UnloadLoRAAdapterReqOutput
from sglang.srt.runtime_context import get_lora
from typing_extensions import override

from sglang_elora.srt.tokenizer.adapter_sources import keep_loaded
from sglang_elora.srt.tokenizer.shared_table import TableLock
from sglang_elora.srt.tokenizer.workers import Workers

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

UNLOAD_PATIENCE_S = 120.0
"""Seconds that an unload waits for requests before it fails; it can be repeated. Raising it keeps
the client waiting longer."""

_POLL_S = 0.02
_LOG_EVERY_S = 10.0
_SHOWN = 3  # most request ids in a message


class AdapterUses(LoRARegistry):
    """SGLang's registry of loaded adapters, with uses determined from the unfinished requests.

    Args:
        manager: Has the unfinished requests.
        workers: The other tokenizer workers, which have requests of their own.
    """

    def __init__(self, manager: TokenizerManager, workers: Workers) -> None:
        super().__init__(get_lora().lora_paths)
        self._manager = manager
        self._workers = workers
        self._acquiring: set[object] = set()
        workers.handle("retire", str, self._retire)

    def add(self, ref: LoRARef) -> None:
        """Register an adapter in place of an earlier one of its name."""
        name = ref.lora_name or ""
        if self._registry.get(name) != ref:
            self.drop(name)
            self._register_adapter(ref)

    def drop(self, name: str) -> None:
        """Remove an adapter, if there is one of this name. No request may be acquiring it."""
        ref = self._registry.pop(name, None)
        if ref is not None:
            self._counters.pop(ref.lora_id, None)

    def uses(self) -> Counter[str]:
        """Number of unfinished requests by adapter id, without those of the base model."""
        states = self._manager.rid_to_state.values()
        ids = (getattr(state.obj, "lora_id", None) for state in states)
        return Counter(adapter_id for adapter_id in ids if isinstance(adapter_id, str))

    @override
    async def acquire(self, lora_name: str | list[str]) -> str | list[str]:
        """The adapter ids of a request, which the caller assigns to the request.

        Until this returns, the request's state does not name its adapter, so an unload also waits
        for this call. The caller does not yield to other tasks between the return and the
        assignment.
        """
        token = object()
        self._acquiring.add(token)
        try:
            ids: str | list[str] = await super().acquire(lora_name)
            return ids
        finally:
            self._acquiring.discard(token)

    @override
    async def release(self, lora_id: str | list[str]) -> None:
        """Do nothing: a request's state names its adapter until it is removed."""

    @override
    async def wait_for_unload(self, lora_id: str) -> None:
        """Wait until no request of any tokenizer worker uses the adapter, which accepts no new
        requests.

        Raises:
            ValueError: Requests still use it after ``UNLOAD_PATIENCE_S``.
        """
        earlier = set(self._acquiring)
        began = logged = time.monotonic()
        while (rids := await self._users_anywhere(lora_id)) or earlier & self._acquiring:
            now = time.monotonic()
            if now - began > UNLOAD_PATIENCE_S:
                raise ValueError(
                    f"the adapter is still used by {_listed(rids)} after {now - began:.0f} s; it "
                    "takes no new requests. Repeat the unload when they are over, or abort them."
                )
            if now - logged > _LOG_EVERY_S:
                logger.info("an unload waits for %s (%.0f s)", _listed(rids), now - began)
                logged = now
            await asyncio.sleep(_POLL_S)
        self._counters.pop(lora_id, None)

    async def _users_anywhere(self, lora_id: str) -> list[str]:
        others = await self._workers.ask("retire", lora_id, list[str])
        return [*self._users(lora_id), *(rid for rids in others for rid in rids)]

    async def _retire(self, lora_id: str) -> list[str]:
        """Accept no new requests for an adapter that another worker unloads; return those that use
        it."""
        name = next((name for name, ref in self._registry.items() if ref.lora_id == lora_id), None)
        if name is not None:
            del self._registry[name]
        earlier = set(self._acquiring)
        while earlier & self._acquiring:
            await asyncio.sleep(_POLL_S)
        self._counters.pop(lora_id, None)
        return self._users(lora_id)

    def _users(self, lora_id: str) -> list[str]:
        states = self._manager.rid_to_state.items()
        return [rid for rid, state in states if getattr(state.obj, "lora_id", None) == lora_id]


def attach(result: None, self: TokenizerManager) -> None:
    """Replace SGLang's adapter registry and the lock of its changes. Runs after
    ``TokenizerManager.init_lora``, which creates them."""
    self.elora_workers = Workers(self)
    self.lora_registry = AdapterUses(self, self.elora_workers)
    self.lora_update_lock = TableLock(self, self.elora_workers)


async def forget_what_was_never_sent(
    original: Callable[..., AsyncIterator[Any]], self: TokenizerManager, obj: Any, *rest: Any
) -> AsyncIterator[Any]:
    """Remove states of requests that were never sent. Runs around
    ``TokenizerManager._handle_batch_request``: with ``n > 1`` requests are sent under new ids, and
    the states of their original ids would stay indefinitely."""
    try:
        async with aclosing(original(self, obj, *rest)) as answers:  # type: ignore[type-var]
            async for answer in answers:
                yield answer
    finally:
        for rid in obj.rid:
            state = self.rid_to_state.get(rid)
            if state is not None and not state.dispatched:
                del self.rid_to_state[rid]


async def forget_path(
    original: Callable[..., Awaitable[UnloadLoRAAdapterReqOutput]],
    self: TokenizerManager,
    obj: UnloadLoRAAdapterReqInput,
    *rest: Any,
) -> UnloadLoRAAdapterReqOutput:
    """Forget the path of an adapter that is unloaded. Runs around ``unload_lora_adapter``:
    otherwise SGLang would load it again for a request that names it meanwhile or later, as it does
    with adapters that ``--max-loaded-loras`` evicted."""
    async with self.lora_update_lock:
        known = self.lora_ref_cache.pop(obj.lora_name, None)
    output = await original(self, obj, *rest)
    if not output.success and known is not None:
        async with self.lora_update_lock:
            self.lora_ref_cache.setdefault(obj.lora_name, known)
    keep_loaded(self)
    return output


def _listed(rids: list[str]) -> str:
    some = ", ".join(rids[:_SHOWN]) + (", ..." if len(rids) > _SHOWN else "")
    return f"{len(rids)} requests ({some})"
