"""The tokenizer process's end of the control channel: sends hints and orders, receives state.

At a request's arrival, before its text is tokenized, it announces the request's adapter to the
schedulers, so that the adapter is already being loaded when the request reaches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.runtime_context import get_memory
from sglang.utils import TypeBasedDispatcher

from sglang_elora.control import HintLimiter, StateMirror
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
)
from sglang_elora.srt.tokenizer.drain import Drain
from sglang_elora.srt.tokenizer.workers import PATIENCE_S, Workers

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""Seconds. ``glance`` returns state up to this age without a new request; raising it lowers the
load and shows older state."""

COLLECT_S = 0.002
"""Seconds after a hint during which further hints are collected into one message. The first hint of
a burst is sent at once."""

ANSWER_S = 60.0
"""Seconds to wait for a scheduler's answer. A scheduler answers between two batches."""

GLANCE_S = 0.2
"""Seconds that ``glance``, and a scrape of metrics, wait for new state."""

_ANSWERS = (StateAnswer, AdapterOrderAnswer, LoadedAnswer, SessionsAnswer)
_SHOWN = 200  # most characters of a dropped message in the log


class NotLoaded(ValueError):
    """No adapter is loaded under this name."""


class NoAnswer(RuntimeError):
    """The scheduler did not answer in time."""


class WorkerReport(msgspec.Struct, frozen=True):
    """What one tokenizer worker, or all of them, know and the scheduler does not.

    Attributes:
        uses: Numbers of unfinished requests by adapter id.
        leases: Seconds left of pins by adapter id.
        hints: Counts of adapter hints since the start.
    """

    uses: dict[str, int]
    leases: dict[str, float]
    hints: dict[str, int]


class TokenizerControl:
    """The control channel of one tokenizer process. Hints never block and never fail."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._manager = manager
        self._registry = manager.lora_registry
        self._workers: Workers = manager.elora_workers
        self._workers.handle("report", type(None), self._report)
        self._workers.handle("end_lease", str, self._end_lease_of)
        self.gate = HintLimiter()  # limits hints per adapter
        self._session_gate = HintLimiter()
        # Only with a host tier for KV can the KV of a session be loaded in advance.
        self._announces_sessions = bool(get_memory().enable_hierarchical_cache)
        self.num_hints = 0
        self.hints: dict[str, int] = {}  # of all workers, at the last report
        self._adapters: list[str] = []  # collected hints, not sent yet
        self._sessions: list[str] = []
        self._collecting: asyncio.TimerHandle | None = None
        self.mirror = StateMirror()
        self._mirrored_s = float("-inf")
        self._leases: dict[str, asyncio.TimerHandle] = {}
        self._asked: dict[str, asyncio.Future[Any]] = {}  # awaited answers by request id
        self._refreshing = asyncio.Lock()
        self.drain = Drain(manager, self)

    def add_to(self, dispatcher: TypeBasedDispatcher) -> None:
        """Register the handlers of answers."""
        dispatcher += TypeBasedDispatcher([(kind, self._answered) for kind in _ANSWERS])
        dispatcher.add_fallback_fn(self._drop)

    def announce(self, names: Any, session: Any = None) -> None:
        """Announce requests that arrived, with the name or names of their adapters and their
        session. Unknown names are ignored here: the request will be refused later."""
        listed = names if isinstance(names, list) else [names]
        refs = (self._ref(name) for name in listed if isinstance(name, str))
        adapters = self.gate.admit(ref.lora_id for ref in refs if ref is not None)
        sessions: list[str] = []
        if self._announces_sessions and isinstance(session, str):
            sessions = self._session_gate.admit([session])
        self.num_hints += len(adapters)
        self._adapters += adapters
        self._sessions += sessions
        if self._collecting is None:
            self._send_hints()

    def _send_hints(self) -> None:
        """Send the collected hints and collect later ones for ``COLLECT_S``, until there are
        none."""
        self._collecting = None
        if self._adapters or self._sessions:
            hint = AdapterHint(adapters=self._adapters, sessions=self._sessions)
            self._adapters, self._sessions = [], []
            self._manager._dispatch_to_scheduler(hint)
            self._collecting = asyncio.get_running_loop().call_later(COLLECT_S, self._send_hints)

    async def refresh(self) -> StateMirror:
        """The current state of the schedulers. Raises NoAnswer."""
        async with self._refreshing:
            more = True
            while more:
                answer: StateAnswer = await self.ask(StateRequest(version=self.mirror.version))
                self.mirror.apply(answer.changes, self.names())
                more = answer.changes.more
            self._mirrored_s = time.monotonic()
        return self.mirror

    async def glance(self) -> StateMirror:
        """The state, at most ``FRESH_S`` old; older if the schedulers do not answer soon."""
        if time.monotonic() - self._mirrored_s > FRESH_S:
            with contextlib.suppress(NoAnswer, TimeoutError):
                await asyncio.wait_for(self.refresh(), GLANCE_S)
        return self.mirror

    async def report(self, patience_s: float = PATIENCE_S) -> WorkerReport:
        """What the tokenizer workers know together, without those that do not answer in time."""
        reports = [await self._report(None)]
        reports += await self._workers.ask("report", None, WorkerReport, patience_s)
        total = WorkerReport(
            uses=_sum(report.uses for report in reports),
            leases={key: left for report in reports for key, left in report.leases.items()},
            hints=_sum(report.hints for report in reports),
        )
        # Metrics may not decrease when a worker gives no answer.
        self.hints = {key: max(n, self.hints.get(key, 0)) for key, n in total.hints.items()}
        return total

    async def loaded_in_scheduler(self) -> list[LoRARef]:
        """The adapters that the schedulers have loaded. Raises NoAnswer."""
        answer: LoadedAnswer = await self.ask(LoadedRequest())
        return answer.adapters

    async def order(self, do: str, adapter_id: str) -> AdapterOrderAnswer:
        """Send an order on an adapter or a session to the schedulers. Raises NoAnswer."""
        answer: AdapterOrderAnswer = await self.ask(AdapterOrder(do=do, adapter=adapter_id))
        return answer

    async def pin(self, adapter_id: str, lease_s: float | None) -> AdapterOrderAnswer:
        """Pin an adapter for ``lease_s`` seconds, or until it is unpinned if None; a new lease
        replaces an earlier one."""
        answer = await self.order("pin", adapter_id)
        if not answer.error:
            await self._end_lease_anywhere(adapter_id)
            if lease_s is not None:
                loop = asyncio.get_running_loop()
                self._leases[adapter_id] = loop.call_later(lease_s, self._lease_over, adapter_id)
        return answer

    async def unpin(self, adapter_id: str) -> AdapterOrderAnswer:
        await self._end_lease_anywhere(adapter_id)
        return await self.order("unpin", adapter_id)

    def id_of(self, name: str) -> str:
        """Id of the adapter with this name. Raises NotLoaded."""
        ref = self._ref(name)
        if ref is None:
            raise NotLoaded(f"LoRA adapter '{name}' is not loaded")
        return str(ref.lora_id)

    def loaded(self) -> dict[str, Any]:
        """``LoRARef`` of each loaded adapter by its served name."""
        return dict(self._registry.get_all_adapters())

    @property
    def serves_metrics(self) -> bool:
        return bool(self._manager.enable_metrics)

    @property
    def model_name(self) -> str:
        return str(self._manager.served_model_name)

    def names(self) -> dict[str, str]:
        """Names of the loaded adapters by id."""
        return {ref.lora_id: name for name, ref in self.loaded().items()}

    async def _report(self, _: None) -> WorkerReport:
        now_s = asyncio.get_running_loop().time()
        return WorkerReport(
            uses=dict(self._registry.uses()),
            leases={key: max(0.0, timer.when() - now_s) for key, timer in self._leases.items()},
            hints={
                "sent": self.num_hints,
                "repeated": self.gate.num_repeated,
                "over_rate": self.gate.num_over_rate,
            },
        )

    def _ref(self, name: str) -> Any:
        # NOTE: ``get_all_adapters`` copies the whole table.
        return self._registry._registry.get(name)

    async def ask(
        self, request: StateRequest | AdapterOrder | LoadedRequest | SessionsRequest
    ) -> Any:
        """The schedulers' answer to a request. Raises NoAnswer."""
        self._manager.auto_create_handle_loop()
        request.rid = uuid.uuid4().hex
        future = self._asked[request.rid] = asyncio.get_running_loop().create_future()
        try:
            self._manager._dispatch_to_scheduler(request)
            return await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            raise NoAnswer(f"the scheduler has not answered within {ANSWER_S:.0f} s") from None
        finally:
            del self._asked[request.rid]

    def _answered(
        self, answer: StateAnswer | AdapterOrderAnswer | LoadedAnswer | SessionsAnswer
    ) -> None:
        future = self._asked.get(answer.rid or "")
        if future is None or future.done():
            self._drop(answer)
        else:
            future.set_result(answer)

    def _lease_over(self, adapter_id: str) -> None:
        self._end_lease(adapter_id)
        task = asyncio.ensure_future(self.order("unpin", adapter_id))
        self._manager.asyncio_tasks.add(task)
        task.add_done_callback(self._manager.asyncio_tasks.discard)

    async def _end_lease_anywhere(self, adapter_id: str) -> None:
        self._end_lease(adapter_id)
        await self._workers.ask("end_lease", adapter_id, type(None))

    async def _end_lease_of(self, adapter_id: str) -> None:
        self._end_lease(adapter_id)

    def _end_lease(self, adapter_id: str) -> None:
        timer = self._leases.pop(adapter_id, None)
        if timer is not None:
            timer.cancel()

    def _drop(self, message: Any) -> None:
        """Log a message without a handler, or an answer whose request has timed out."""
        logger.warning("message dropped: %s", str(message)[:_SHOWN])


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
