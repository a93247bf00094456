"""The swapper of one scheduler process: runs the planner's decisions once per iteration.

The scheduler calls ``step`` once per iteration, between receiving requests and choosing the next
batch, and ``prepare`` after a batch was launched. A step (1) completes reads and copies that have
ended on every rank, (2) has the planner (``swapper/planner.py``) start loads for queued and
expected requests, (3) ends requests whose adapter cannot be loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.scheduler import _make_abort_req

from sglang_elora.srt.measured_costs import MeasuredCosts
from sglang_elora.srt.mem_cache.residency import PURGE_NODES, Residency
from sglang_elora.srt.scheduler.memory import SchedulerMemory
from sglang_elora.srt.scheduler.parts import elora_of
from sglang_elora.srt.scheduler.settling import Settling
from sglang_elora.swapper.adapter_copy import AdapterCopy
from sglang_elora.swapper.planner import Planner

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

logger = logging.getLogger(__name__)

EVICT_LEAVES = 16
"""Most leaves evicted per step of an adapter that an order evicts. More end sooner, and lengthen
the steps."""

_IDLE_S = 200e-6
"""Seconds that an idle scheduler sleeps per iteration while a read or copy is in progress."""


class Swapper:
    """Completes and starts loads and evictions of one scheduler process.

    Args:
        residency: The adapters on the device and their images.
        measure: Measured costs of copies and prefill.
    """

    def __init__(self, residency: Residency, measure: MeasuredCosts) -> None:
        self.residency = residency
        self._core, self._host = residency.core, residency.host
        self.planner: Planner[UnifiedTreeNode] = Planner(SchedulerMemory(residency), measure)
        self._settling = Settling(residency, measure, self.planner.pending)
        self._leaving: dict[str, None] = {}  # adapters to evict by order
        self._core.adapter_table.on_removed = measure.popularity.forget

    def step(self, scheduler: Scheduler, *, is_busy: bool) -> None:
        """Complete reads and copies that have ended, and start those needed next. Never blocks.

        Args:
            is_busy: Whether batches run.
        """
        planner, queue = self.planner, scheduler.waiting_queue
        planner.begin_step(is_busy=is_busy)
        self._settling.begin_step()
        self._fail_waiting(scheduler)
        planner.load(queue, self._rest_of(scheduler.chunked_req))
        self._settling.confirm()  # before a batch can use the adapter
        self._fail_waiting(scheduler)
        planner.load_session()
        planner.read_ahead(queue, is_busy=is_busy)
        self._host.drop_surplus()
        if not is_busy:
            self.prepare()

    def prepare(self) -> None:
        """Do work that makes later steps shorter. Call after a batch was launched, or when idle."""
        self._core.refresh_order()
        if not (self._evict_leaving() or self.residency.purge_retired(PURGE_NODES)):
            self.planner.prepare()

    def is_hidden(self, copy: AdapterCopy, req: Req, adder: PrefillAdder) -> bool:
        """Whether a batch with this request may start before the copy has finished
        (``Planner.is_hidden``)."""
        num_tokens = len(req.origin_input_ids)
        is_idle = not adder.can_run_list and bool(adder.running_batch.is_empty())
        return self.planner.is_hidden(
            copy.adapter_id,
            num_tokens,
            is_idle=is_idle,
            waits_whole=self.residency.adapts_embedding(copy.adapter_id)
            or (not is_idle and self._replays_graph(num_tokens, adder)),
        )

    def _replays_graph(self, num_tokens: int, adder: PrefillAdder) -> bool:
        """Whether the batch being formed will be replayed from a prefill graph, estimated from the
        requests chosen so far and this one, whose prefill the chunk size limits."""
        if adder.rem_chunk_tokens is not None:
            num_tokens = min(num_tokens, adder.rem_chunk_tokens)
        num_requests = len(adder.can_run_list) + 1
        return self.residency.replays_prefill_graph(
            num_requests, adder.log_input_tokens + num_tokens
        )

    def expect(self, adapter_ids: Iterable[str], *, ordered: bool = False) -> int:
        """Load adapters of requests that are about to arrive (``Planner.expect``)."""
        adapter_ids = list(adapter_ids)
        num_taken = self.planner.expect(adapter_ids, ordered=ordered)
        for adapter_id in adapter_ids:
            if adapter_id in self.planner.pending:
                self._leaving.pop(adapter_id, None)
        return num_taken

    def evict_soon(self, adapter_id: str) -> None:
        """Evict an adapter and its KV from the device, a bounded part per step.

        Raises:
            ValueError: A running or queued request needs it, or it is pinned.
        """
        is_pinned = self.residency.adapter_table.get(
            adapter_id
        ).pinned  # a pin locks the adapter only once it is on the device
        if is_pinned or self._core.is_locked(adapter_id) or self.planner.is_queued(adapter_id):
            raise ValueError("a request uses the adapter or waits for it, or it is pinned")
        self.planner.pending.forget(adapter_id)
        if self.residency.adapter_table.get(adapter_id).resident:
            self._leaving[adapter_id] = None

    def used(self, adapter_id: str) -> None:
        """Record that a request with this adapter runs."""
        self.residency.adapter_table.used(adapter_id, time.monotonic())
        self.planner.used(adapter_id)

    @property
    def is_waiting(self) -> bool:
        """Whether a read, copy or purge is in progress, so that the next step must follow soon."""
        return bool(self.residency.copies or self._host.reading or self.residency.is_purging)

    def _fail_waiting(self, scheduler: Scheduler) -> None:
        """End queued requests whose adapter could not be loaded, with the error."""
        errors = self._settling.take_errors()
        if not errors:
            return
        for req in [r for r in scheduler.waiting_queue if r.lora_id in errors]:
            error = errors[req.lora_id]
            name = self.residency.name_of(req.lora_id)
            reason = {
                "type": "abort",
                "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
                "message": f"LoRA adapter '{name}' cannot be loaded: {error}",
            }
            self._core.counts.requests_failed += 1
            scheduler.waiting_queue.remove(req)
            scheduler._release_aborted_request(req)
            answer = _make_abort_req(req, finished_reason=reason)
            scheduler.ipc_channels.send_to_tokenizer.send_output(answer, req)

    def _rest_of(self, chunked: Req | None) -> int:
        """Slots for the remaining tokens of a prompt that is computed chunk by chunk.

        SGLang allocates its next chunk without a check, and crashes if there is no room.
        """
        if chunked is None:
            return 0
        page_size: int = self.residency.allocator.page_size
        num_left: int = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
        return num_left + page_size

    def _evict_leaving(self) -> bool:
        """Evict a part of the next adapter to evict by order. Returns whether there was one."""
        if not self._leaving:
            return False
        adapter_id = next(iter(self._leaving))
        is_over = adapter_id not in self.residency.adapter_table or self.planner.is_queued(
            adapter_id
        )
        if is_over or self.residency.evict_branch(adapter_id, EVICT_LEAVES):
            del self._leaving[adapter_id]
        return True


def step(
    self: Scheduler,
    running_batch: ScheduleBatch,
    last_batch: ScheduleBatch | None,
    *_: Any,
    **__: Any,
) -> None:
    """Run a step of the swapper. Runs before ``Scheduler.get_next_batch_to_run``."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.step(self, is_busy=last_batch is not None or not running_batch.is_empty())


def prepare(result: Any, self: Scheduler, *_: Any, **__: Any) -> None:
    """Prepare later steps while the device runs the batch. Runs after ``Scheduler.run_batch``."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.prepare()
        elora.residency.launched()  # after ``prepare``: its evictions count as free at this launch


def idle(result: None, self: Scheduler) -> None:
    """Sleep briefly, to leave the interpreter to threads that read files. Runs after
    ``Scheduler.on_idle``."""
    elora = elora_of(self)
    if elora is not None and elora.swapper.is_waiting:
        time.sleep(_IDLE_S)


def sleep_on_idle(original: Callable[[Scheduler], None], self: Scheduler) -> None:
    """Keep the scheduler awake while the swapper has work in progress. Runs around
    ``Scheduler.maybe_sleep_on_idle``, which wakes up only for messages."""
    elora = elora_of(self)
    if elora is None or not elora.swapper.is_waiting:
        original(self)
