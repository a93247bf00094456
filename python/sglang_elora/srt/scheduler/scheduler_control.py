"""The scheduler's end of the control channel: handles hints, orders and state requests.

Messages arrive with requests and are handled between two iterations, each in microseconds. Longer
work (reading a file, a copy, an eviction) is done in later steps of the swapper. Messages that
cannot be decoded are counted and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.utils import TypeBasedDispatcher

from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.srt.messages import (
    AdapterHint,
    AdapterOrder,
    AdapterOrderAnswer,
    LoadedAnswer,
    LoadedRequest,
    SessionsAnswer,
    SessionsRequest,
    StateAnswer,
    StateRequest,
    Undecodable,
    WorkersAnswer,
    WorkersCall,
    valid,
)
from sglang_elora.srt.orders import GuardedDispatcher
from sglang_elora.srt.scheduler.parts import elora_of
from sglang_elora.srt.scheduler.state import changes_since
from sglang_elora.srt.scheduler.swapper import Swapper
from sglang_elora.swapper.pending_hints import MAX_PENDING

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

_SHOWN = 200  # most characters of a dropped message in the log


class Control:
    """Message handlers of one scheduler process. All ranks get the same messages in one order."""

    def __init__(self, scheduler: Scheduler, swapper: Swapper) -> None:
        self._scheduler = scheduler
        self._swapper = swapper
        self._residency: Residency = swapper.residency

    def add_to(self, dispatcher: TypeBasedDispatcher) -> None:
        """Register the handlers, and ``drop`` for messages without a handler."""
        handlers: dict[type, Callable[[Any], Any]] = {
            AdapterHint: self.hint,
            StateRequest: self.state,
            AdapterOrder: self.order,
            LoadedRequest: self.loaded,
            SessionsRequest: self.sessions,
        }
        dispatcher += TypeBasedDispatcher(
            [(kind, partial(self._handle, handler)) for kind, handler in handlers.items()]
        )
        dispatcher.add_fallback_fn(self.drop)

    def _handle(self, handler: Callable[[Any], Any], message: Any) -> Any:
        try:
            message = valid(message)
        except (msgspec.MsgspecError, AttributeError, TypeError):
            return self.drop(message)
        return handler(message)

    def drop(self, message: Any) -> None:
        """Count and log a message without a handler, mostly ``Undecodable``."""
        counts = self._residency.core.counts
        counts.messages_dropped += 1
        dropped = counts.messages_dropped
        if dropped & (dropped - 1) == 0:  # log at powers of two only
            logger.warning("%d messages dropped, the last: %s", dropped, _text(message)[:_SHOWN])

    def hint(self, hint: AdapterHint) -> None:
        self._swapper.expect(hint.adapters)
        self._swapper.planner.expect_sessions(hint.sessions)

    def state(self, request: StateRequest) -> StateAnswer:
        changes = changes_since(self._residency, self._scheduler, request.version)
        return StateAnswer(rid=request.rid, changes=changes)

    def loaded(self, request: LoadedRequest) -> LoadedAnswer:
        manager = self._scheduler.tp_worker.model_runner.lora_manager
        return LoadedAnswer(rid=request.rid, adapters=list(manager.lora_refs.values()))

    def sessions(self, request: SessionsRequest) -> SessionsAnswer:
        of_tree = self._residency.core.sessions.with_kv()
        streaming = self._scheduler.session_controller.sessions
        return SessionsAnswer(rid=request.rid, sessions=[*{*of_tree, *streaming}])

    def order(self, order: AdapterOrder) -> AdapterOrderAnswer:
        adapter_id, orders = (
            order.adapter,
            {
                "prefetch": self._prefetch,
                "read": self._read,
                "pin": self._pin,
                "unpin": self._residency.unpin,
                "evict": self._swapper.evict_soon,
            },
        )
        adapter_table, error = self._residency.adapter_table, ""
        if order.do == "prefetch_session":
            if not self._swapper.planner.expect_sessions([adapter_id]):
                error = "no session of this name is alive"
        elif order.do not in orders:
            error = f"unknown order {order.do!r}"
        elif adapter_id not in adapter_table or adapter_table.get(adapter_id).retired:
            error = "the adapter is not loaded"
        else:
            try:
                orders[order.do](adapter_id)
            except ValueError as refused:
                error = str(refused)
        tier = self._residency.tier_of(adapter_id) if adapter_id in adapter_table else ""
        return AdapterOrderAnswer(rid=order.rid, error=error, tier=tier)

    def _prefetch(self, adapter_id: str) -> None:
        if not self._swapper.expect([adapter_id], ordered=True):
            raise ValueError(f"{MAX_PENDING} adapters are expected already: ask again later")

    def _read(self, adapter_id: str) -> None:
        self._swapper.planner.read_first([adapter_id])

    def _pin(self, adapter_id: str) -> None:
        self._residency.pin(adapter_id)
        self._swapper.expect([adapter_id], ordered=True)


def add_to_dispatcher(result: None, self: Scheduler) -> None:
    """Register the handlers. Runs after ``Scheduler.init_request_dispatcher``."""
    self._request_dispatcher += TypeBasedDispatcher(
        [(WorkersCall, lambda call: call), (WorkersAnswer, _to_caller)]
    )
    elora = elora_of(self)
    if elora is not None:
        Control(self, elora.swapper).add_to(self._request_dispatcher)
    self._request_dispatcher = GuardedDispatcher(self._request_dispatcher)


def _to_caller(answer: WorkersAnswer) -> WorkersAnswer:
    answer.http_worker_ipc = answer.to
    return answer


def _text(message: Any) -> str:
    return message.reason if isinstance(message, Undecodable) else type(message).__name__
