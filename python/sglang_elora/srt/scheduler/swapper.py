"""The swapper of one scheduler process: carries out, step by step, what the planner decides.

The scheduler calls ``step`` once per iteration, between receiving requests and choosing the next
batch, and ``prepare`` once a batch was launched. A step (1) completes reads and copies that have
ended on every rank, (2) has the planner (``swapper/planner.py``) start loads for queued and for
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
"""Most leaves per batch that are evicted of an adapter which an order evicts."""

_IDLE_S = 200e-6


class Swapper:
    """One per scheduler process.

    Args:
        residency: Where adapters are.
        measure: What copies and prefill take.
    """

    def __init__(self, residency: Residency, measure: MeasuredCosts) -> None:
        self.residency = residency
        self._core, self._host = residency.core, residency.host
        self.planner: Planner[UnifiedTreeNode] = Planner(SchedulerMemory(residency), measure)
        self._settling = Settling(residency, measure, self.planner.pending)
        self._leaving: dict[str, None] = {}  # adapters that orders evict
        self._core.adapter_table.on_removed = measure.popularity.forget

    def step(self, scheduler: Scheduler, *, is_busy: bool) -> None:
        """Complete what has ended and start what is needed next. Never blocks.

        Args:
            is_busy: Whether batches run.
        """
        planner, queue = self.planner, scheduler.waiting_queue
        planner.begin_step(is_busy=is_busy)
        self._settling.begin_step()
        self._fail_waiting(scheduler)
        planner.load(queue, self._rest_of(scheduler.chunked_req))
        self._settling.confirm()  # before anything is done with the adapter
        self._fail_waiting(scheduler)
        planner.load_session()
        planner.read_ahead(queue, is_busy=is_busy)
        self._host.drop_surplus()
        if not is_busy:
            self.prepare()

    def prepare(self) -> None:
        """Do what makes later steps shorter. A batch has just begun, or none is to run."""
        self._core.refresh_order()
        if not (self._evict_leaving() or self.residency.purge_retired(PURGE_NODES)):
            self.planner.prepare()

    def is_hidden(self, copy: AdapterCopy, req: Req, adder: PrefillAdder) -> bool:
        """Whether a batch with this request may be started before the copy is over
        (``Planner.is_hidden``)."""
        num_tokens = len(req.origin_input_ids)
        is_idle = not adder.can_run_list and bool(adder.running_batch.is_empty())
        return self.planner.is_hidden(
            copy.adapter_id,
            num_tokens,
            is_idle=is_idle,
            replays_graph=not is_idle and self._replays_graph(num_tokens, adder),
        )

    def _replays_graph(self, num_tokens: int, adder: PrefillAdder) -> bool:
        """Whether the batch being formed is replayed from a prefill graph, as far as is known: by
        the requests chosen so far and one more, whose prefill the chunk size limits."""
        if adder.rem_chunk_tokens is not None:
            num_tokens = min(num_tokens, adder.rem_chunk_tokens)
        num_requests = len(adder.can_run_list) + 1
        return self.residency.replays_prefill_graph(
            num_requests, adder.log_input_tokens + num_tokens
        )

    def expect(self, adapter_ids: Iterable[str], *, ordered: bool = False) -> int:
        """Requests with these adapters are about to arrive (``Planner.expect``)."""
        adapter_ids = list(adapter_ids)
        num_taken = self.planner.expect(adapter_ids, ordered=ordered)
        for adapter_id in adapter_ids:
            if adapter_id in self.planner.pending:
                self._leaving.pop(adapter_id, None)
        return num_taken

    def evict_soon(self, adapter_id: str) -> None:
        """Have an adapter and its KV leave the device, a bounded part of it per step.

        Raises:
            ValueError: A request uses it or waits for it, or it is pinned.
        """
        is_pinned = self.residency.adapter_table.get(
            adapter_id
        ).pinned  # also before it is on the device
        if is_pinned or self._core.is_locked(adapter_id) or self.planner.is_queued(adapter_id):
            raise ValueError("a request uses the adapter or waits for it, or it is pinned")
        self.planner.pending.forget(adapter_id)
        if self.residency.adapter_table.get(adapter_id).resident:
            self._leaving[adapter_id] = None

    def used(self, adapter_id: str) -> None:
        """A request with this adapter runs."""
        self.residency.adapter_table.used(adapter_id, time.monotonic())
        self.planner.used(adapter_id)

    @property
    def is_waiting(self) -> bool:
        """Whether something is under way, for which there must be a next step soon."""
        return bool(self.residency.copies or self._host.reading or self.residency.is_purging)

    def _fail_waiting(self, scheduler: Scheduler) -> None:
        """Requests whose adapter could not be brought in end with the reason."""
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
        """Slots for what is left to compute of a prompt that is computed chunk by chunk.

        SGLang takes its next chunk without asking, and ends if there is no room for it.
        """
        if chunked is None:
            return 0
        page_size: int = self.residency.allocator.page_size
        num_left: int = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
        return num_left + page_size

    def _evict_leaving(self) -> bool:
        """Some of what was told to leave. Whether there was something."""
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
    """Before ``Scheduler.get_next_batch_to_run``."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.step(self, is_busy=last_batch is not None or not running_batch.is_empty())


def prepare(result: Any, self: Scheduler, *_: Any, **__: Any) -> None:
    """After ``Scheduler.run_batch``: the device is at work now."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.prepare()
        elora.residency.launched()  # what was evicted just now is free, as of this batch


def idle(result: None, self: Scheduler) -> None:
    """After ``Scheduler.on_idle``. Threads that read files need the interpreter."""
    elora = elora_of(self)
    if elora is not None and elora.swapper.is_waiting:
        time.sleep(_IDLE_S)


def sleep_on_idle(original: Callable[[Scheduler], None], self: Scheduler) -> None:
    """Around ``Scheduler.maybe_sleep_on_idle``, which wakes up for messages only."""
    elora = elora_of(self)
    if elora is None or not elora.swapper.is_waiting:
        original(self)
