"""Which requests use an adapter, so that an unload waits for them and for nothing else.

SGLang counts: one more when a request's adapter is resolved, one less when its answer is complete.
Requests that end otherwise (refused after that point, aborted in the queue, disconnected) are
never taken off, and copies made for ``n > 1`` are taken off without having been counted. So nothing
is counted here: what uses an adapter are the requests in SGLang's own table of requests that are
not over (``TokenizerManager.rid_to_state``), which names each request's adapter.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput, UnloadLoRAAdapterReqOutput
from sglang.srt.runtime_context import get_lora
from typing_extensions import override

from sglang_elora.srt.tokenizer.adapter_sources import keep_loaded

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

UNLOAD_PATIENCE_S = 120.0
"""An unload that requests hold up for longer is answered with an error; it can be repeated."""

_POLL_S = 0.02
_LOG_EVERY_S = 10.0
_SHOWN = 3  # request ids in a message


class AdapterUses(LoRARegistry):
    """SGLang's registry of loaded adapters, whose users are the requests that are not over."""

    def __init__(self, manager: TokenizerManager) -> None:
        super().__init__(get_lora().lora_paths)
        self._manager = manager
        self._acquiring: set[object] = set()

    def uses(self) -> Counter[str]:
        """Requests that are not over, by adapter id; those of the base model are left out."""
        states = self._manager.rid_to_state.values()
        ids = (getattr(state.obj, "lora_id", None) for state in states)
        return Counter(adapter_id for adapter_id in ids if isinstance(adapter_id, str))

    @override
    async def acquire(self, lora_name: str | list[str]) -> str | list[str]:
        """The adapter ids of a request, which is about to carry them.

        Until this returns, the request's state does not name its adapter, so an unload also waits
        for it. The code between this return and that assignment does not yield to other tasks.
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
        """Does nothing: a request's state names its adapter until it is removed."""

    @override
    async def wait_for_unload(self, lora_id: str) -> None:
        """Return when no request uses the adapter, which takes no new ones any more.

        Raises:
            ValueError: Some still do after ``UNLOAD_PATIENCE_S``.
        """
        earlier = set(self._acquiring)
        began = logged = time.monotonic()
        while (rids := self._users(lora_id)) or earlier & self._acquiring:
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

    def _users(self, lora_id: str) -> list[str]:
        states = self._manager.rid_to_state.items()
        return [rid for rid, state in states if getattr(state.obj, "lora_id", None) == lora_id]


def attach(result: None, self: TokenizerManager) -> None:
    """After ``TokenizerManager.init_lora``, which makes SGLang's registry."""
    self.lora_registry = AdapterUses(self)


async def forget_what_was_never_sent(
    original: Callable[..., AsyncIterator[Any]], self: TokenizerManager, obj: Any, *rest: Any
) -> AsyncIterator[Any]:
    """Around ``TokenizerManager._handle_batch_request``: with ``n > 1`` requests are sent under new
    ids, and the states made for their original ids would stay indefinitely."""
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
    """Around ``unload_lora_adapter``: SGLang would load it again for the next request that names
    it, as it does with adapters that ``--max-loaded-loras`` drove out."""
    output = await original(self, obj, *rest)
    if output.success:
        self.lora_ref_cache.pop(obj.lora_name, None)
    keep_loaded(self)
    return output


def _listed(rids: list[str]) -> str:
    some = ", ".join(rids[:_SHOWN]) + (", ..." if len(rids) > _SHOWN else "")
    return f"{len(rids)} requests ({some})"
