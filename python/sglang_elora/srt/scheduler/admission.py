"""Admission: a request enters a batch only if its adapter and its tokens both fit into the pool.

For each queued request, in queue order, SGLang's scheduler checks whether its adapter can run
(``Scheduler.can_schedule_lora_req``), and then matches, budgets and locks the request. Adapters are
loaded while requests are queued (``swapper.py``). Between the check and the lock only a preemption
evicts, and it keeps the adapter; after that, the lock on the request's path protects the adapter
until the request releases it.

No request holds a part of its resources while it waits for the rest, so there is no deadlock. A
request whose adapter is not on the device is skipped, and requests after it in the queue are
admitted. After ``MAX_BYPASS`` such bypasses, no request after it is admitted before it. Requests
before it in the queue still are, so the first queued request, whose adapter the swapper always
loads, never waits for another one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.session.streaming_session import is_virtual_node

from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.srt.scheduler.parts import elora_of
from sglang_elora.srt.scheduler.shared_prompts import SharedPrompts
from sglang_elora.srt.scheduler.swapper import Swapper
from sglang_elora.tree import (
    ActivatedAdapter,
    ActivatedNamespace,
    base_namespace,
    last_occurrence,
    num_inactive,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_BYPASS = 64
"""Number of requests that may be admitted before a queued one ahead of them; after that it blocks
all requests after it. Raising it helps throughput and lengthens the longest wait."""


@dataclass(slots=True, eq=False)
class _Pass:
    """One pass of SGLang's scheduler over the waiting queue."""

    num_admitted: int = 0
    is_held: bool = False  # a refused request blocks all requests after it


@dataclass(slots=True, eq=False)
class _Refusal:
    """State of a queued request that was refused. It is an attribute of the request
    (``elora_refusal``), so that aborted requests leave nothing to clean up."""

    since_s: float | None  # start of the wait (monotonic clock); None while the request runs
    asked_in: _Pass  # the last pass that checked the request
    num_admitted: int  # requests admitted by that pass before the refusal
    num_bypasses: int = 0
    """Requests after it in the queue that earlier passes admitted. It is kept over a retraction, so
    that a request does not have to wait for ``MAX_BYPASS`` others twice."""

    def add_bypasses(self) -> None:
        """Add the bypasses of the last pass that checked the request."""
        self.num_bypasses += self.asked_in.num_admitted - self.num_admitted


class Admission:
    """Admission of one scheduler. Its inputs are equal on all tensor-parallel ranks, and so are its
    decisions.

    Args:
        residency: The adapters on the device.
        swapper: Loads adapters.
        max_adapters: Most distinct adapters in one batch.
        num_drafted: Slots that a running request has in addition to those of its tokens, for
            speculative decoding.
    """

    def __init__(
        self, residency: Residency, swapper: Swapper, max_adapters: int, num_drafted: int = 0
    ) -> None:
        self.residency = residency
        self.swapper = swapper
        self.max_adapters = max_adapters
        self.num_drafted = num_drafted
        self._pass = _Pass()
        self._shared = SharedPrompts(residency.core)

    def begin_pass(self, adder: PrefillAdder) -> None:
        """Begin a pass: SGLang fills a prefill batch and checks each queued request once."""
        self.adder = adder
        self._shared.begin_pass()
        self._pass = _Pass()

    def taken(self, req: Req) -> None:
        """Record that SGLang put the request into the batch, and visit the nodes that it uses."""
        refusal = _refusal_of(req)
        if refusal is not None and refusal.since_s is not None:
            waited_s = time.monotonic() - refusal.since_s
            self.residency.core.counts.requests_waited_for_adapter += 1
            self.residency.core.counts.ms_waited_for_adapter += round(1e3 * waited_s)
            refusal.since_s = None  # it may be retracted and queued again
            refusal.add_bypasses()
        if not req.retracted_stain:
            self._count_prompt(req)
        self._pass.num_admitted += 1
        self._shared.taken(req)
        self._visit(req)
        if req.lora_id is not None:
            self.swapper.used(req.lora_id)

    def _visit(self, req: Req) -> None:
        core, node = self.residency.core, req.last_node
        if is_virtual_node(node):  # the KV of an open streaming session is its own
            node = core.root_node.id if req.lora_id is None else core.node_of(req.lora_id).id
        core.visit(node)

    def _count_prompt(self, req: Req) -> None:
        counts, found = self.residency.core.counts, req.prefix_len
        tokens = counts.prompt_tokens
        from_host = min(found, req.materialized_host_hit_len())
        tokens["device"] += found - from_host
        tokens["host"] += from_host
        tokens["computed"] += (computed := len(req.origin_input_ids) - found)
        if req.lora_id is not None:
            self.residency.adapter_table.get(req.lora_id).computed_tokens += computed
        if (shared := num_inactive(req.lora_id, 0, found)) > 0:
            counts.shared_tokens += shared
            self.residency.adapter_table.get(req.lora_id).shared_tokens += shared

    def admit(self, req: Req, running: set[str | None]) -> bool:
        """Whether the request may be added to the batch now; if so, its adapter has slots.

        O(1), independent of the queue's length; for an activated LoRA one walk of the tree if
        another request may compute its prompt.

        Args:
            running: Adapters of the batch so far and of the running batch.
        """
        if self._pass.is_held:
            return False
        if not self._secure(req, running):
            self._refused(req)
            return False
        return not self._shared.waits(req)

    @contextmanager
    def keeping_adapter_of(self, req: Req) -> Iterator[None]:
        """Protect the adapter of an admitted request, which is not locked yet, from evictions."""
        core = self.residency.core
        node = None if req.lora_id is None else core.node_of(req.lora_id)
        if node is not None:
            core.inc_full_pin(node.id)
        try:
            yield
        finally:
            if node is not None:
                core.dec_full_pin(node.id)

    def activate(self, req: Req) -> None:
        """Have an activated LoRA act from its last invocation in the prompt on (PEFT's rule). A
        request without one becomes a request of the base model."""
        invocation = self.residency.adapter_table.get(req.lora_id).invocation
        if not invocation:
            return
        if req.session is not None and req.session.streaming:
            req.set_finish_with_abort(
                "An activated LoRA takes no turn of a streaming session: the KV of earlier turns "
                "may be of its own, and its next turn needs that of the base model."
            )
            return
        base = base_namespace(req.caller_extra_key)
        start = last_occurrence(req.origin_input_ids, invocation)
        if start is None:
            req.lora_id, req.extra_key = None, base
            return
        req.extra_key = ActivatedNamespace.of(
            req.lora_id, req.caller_extra_key or "", base, start, self.residency.allocator.page_size
        )
        req.lora_id = ActivatedAdapter.of(req.lora_id, start)

    def received(self, req: Req) -> None:
        """Limit the answer's length to the slots that the pool has in addition to the adapter, as
        SGLang limits it to the whole pool. A prompt that does not fit with its adapter ends with
        HTTP 400.
        """
        self.activate(req)
        residency = self.residency
        if req.lora_id is not None:
            residency.core.counts.adapter_lookups[residency.tier_of(req.lora_id)] += 1
        adapter, page_size = residency.adapter_table.get(req.lora_id), residency.allocator.page_size
        others = residency.adapter_table.pinned_slots - adapter.num_slots * adapter.pinned
        num_tokens = -(-len(req.origin_input_ids) // page_size) * page_size
        room = residency.pool_slots - adapter.num_slots - others - num_tokens - page_size - 1
        room -= self.num_drafted
        if room < 1:
            req.set_finish_with_abort(
                f"The input ({len(req.origin_input_ids)} tokens) does not fit into the KV pool of "
                f"{residency.pool_slots} slots beside its adapter ({adapter.num_slots} slots) and "
                f"pinned adapters ({others} slots)."
            )
        params = req.sampling_params
        params.max_new_tokens = max(0, min(params.max_new_tokens, room))
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)

    def _secure(self, req: Req, running: set[str | None]) -> bool:
        if req.lora_id is None:
            return True
        if req.lora_id not in running and len(running) - (None in running) >= self.max_adapters:
            return False
        if not self.residency.adapter_table.get(req.lora_id).resident:
            return False
        copy = self.residency.copies.get(req.lora_id)
        return copy is None or self.swapper.is_hidden(copy, req, self.adder)

    def _refused(self, req: Req) -> None:
        refusal, now = _refusal_of(req), self._pass
        if refusal is None:
            req.elora_refusal = _Refusal(time.monotonic(), now, now.num_admitted)
            return
        num_before = refusal.num_bypasses
        if refusal.since_s is None:
            refusal.since_s = time.monotonic()
        else:
            refusal.add_bypasses()
        refusal.asked_in, refusal.num_admitted = now, now.num_admitted
        now.is_held = refusal.num_bypasses >= MAX_BYPASS
        if now.is_held and num_before < MAX_BYPASS:
            logger.info("request %s was passed by %d others: they wait now", req.rid, MAX_BYPASS)


def _refusal_of(req: Req) -> _Refusal | None:
    refusal: _Refusal | None = getattr(req, "elora_refusal", None)
    return refusal


def begin_pass(result: None, self: PrefillAdder, *_: Any, **__: Any) -> None:
    """Begin a pass with this adder. Runs after ``PrefillAdder.__init__``."""
    elora = elora_of(self)
    if elora is not None:
        elora.admission.begin_pass(self)


def note_taken(result: Any, self: PrefillAdder, req: Req, *_: Any, **__: Any) -> None:
    """Record an admitted request. Runs after ``PrefillAdder.add_one_req``, whose result is about
    the next request, so the adder's list is checked."""
    elora = elora_of(self)
    if elora is not None and self.can_run_list and self.can_run_list[-1] is req:
        elora.admission.taken(req)


def preempt(original: Callable[..., bool], self: PrefillAdder, req: Req) -> bool:
    """Preempt running requests for an admitted one, whose adapter stays. Runs around
    ``PrefillAdder.preempt_to_schedule``, which evicts."""
    elora = elora_of(self)
    if elora is None:
        return original(self, req)
    with elora.admission.keeping_adapter_of(req):
        return original(self, req)


def admit(self: Scheduler, req: Req, running_loras: set[str | None]) -> bool:
    """Whether the request may be added to the batch. Replaces ``Scheduler.can_schedule_lora_req``,
    which counts the slots of SGLang's LoRA pool and drains them."""
    elora = elora_of(self)
    assert elora is not None, "SGLang asks with LoRA only"
    return elora.admission.admit(req, running_loras)


def refuse_too_long(result: None, self: Scheduler, req: Req) -> None:
    """Limit a request to the slots that remain with its adapter (``Admission.received``). Runs
    after ``Scheduler.init_req_max_new_tokens``."""
    elora = elora_of(self)
    if elora is not None:
        elora.admission.received(req)


def refuse_too_long_embedding(self: Scheduler, req: Req, *_: Any, **__: Any) -> None:
    """As ``refuse_too_long`` for models that generate nothing, whose requests do not get there.
    Runs before ``Scheduler._add_request_to_queue``."""
    elora = elora_of(self)
    if elora is not None and not self.is_generation:
        elora.admission.received(req)
