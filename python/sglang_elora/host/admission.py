"""Admission: a request enters a batch only when its adapter and its tokens can be held together.

SGLang's scheduler asks about each waiting request, in queue order, whether its adapter can run
(``Scheduler.can_schedule_lora_req``), and then matches, budgets and locks the request. Between the
question and the lock nothing is evicted, so slots given to the adapter there are still its own
when the lock on the request's path protects them, for as long as the request holds that lock.

No request holds a part of what it needs while it waits for the rest, so none waits for another in
a circle. A request whose adapter has no room is passed by; those behind it go on, until
``MAX_BYPASS`` of them have: then nothing else is admitted before it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult

from sglang_elora.host.lora_manager import EloraLoRAManager
from sglang_elora.host.residency import Residency

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_BYPASS = 64
"""Requests admitted past a waiting one before it holds back all others."""


class Admission:
    """One per scheduler. All it decides by is equal on all tensor-parallel ranks."""

    def __init__(self, residency: Residency, max_adapters: int) -> None:
        self.residency = residency
        self.max_adapters = max_adapters  # in one batch
        self._adder: PrefillAdder | None = None
        self._allowed: list[Req] = []  # in this pass
        self._num_admitted = 0
        self._first_refused_at: dict[str, int] = {}  # request id -> _num_admitted then
        self._holder: Req | None = None  # the request all others wait for

    def begin_pass(self, adder: PrefillAdder) -> None:
        """SGLang starts to fill a prefill batch."""
        self._count_admitted()
        self._adder = adder
        self.residency.purge_retired()

    def admit(self, req: Req, waiting: list[Req], running: set[str | None]) -> bool:
        """Whether the request may be added now; its adapter has its slots if so.

        Args:
            running: Adapters of the batch so far, and of the running one.
        """
        if self._holder is not None:
            if self._holder not in waiting:  # aborted
                self._forget(self._holder)
            elif req is not self._holder:
                return False
        if not self._secure(req, running):
            self._refused(req, waiting)
            return False
        self._allowed.append(req)
        return True

    def fit(self, req: Req) -> None:
        """Clip the answer to what the pool can hold beside the adapter, as SGLang clips it to the
        whole pool; a prompt that can never be held with its adapter ends with HTTP 400.
        """
        residency = self.residency
        adapter, page_size = residency.forest.get(req.lora_id), residency.allocator.page_size
        others = residency.forest.pinned_slots - adapter.num_slots * adapter.pinned
        num_tokens = -(-len(req.origin_input_ids) // page_size) * page_size
        room = residency.pool_slots - adapter.num_slots - others - num_tokens - page_size - 1
        if room < 1:
            req.set_finish_with_abort(
                f"The input ({len(req.origin_input_ids)} tokens) does not fit into the KV pool of "
                f"{residency.pool_slots} slots beside its adapter ({adapter.num_slots} slots) and "
                f"pinned adapters ({others} slots)."
            )
        params = req.sampling_params
        params.max_new_tokens = max(0, min(params.max_new_tokens, room))
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)

    def _count_admitted(self) -> None:
        """Of the requests allowed in the last pass, those that SGLang took."""
        taken = set(map(id, self._adder.can_run_list)) if self._adder is not None else set()
        for req in self._allowed:
            if id(req) in taken:
                self._forget(req)
                self._num_admitted += 1
                self.residency.forest.get(req.lora_id).visits += 1
        self._allowed.clear()

    def _secure(self, req: Req, running: set[str | None]) -> bool:
        if req.lora_id is None:
            return True
        if req.lora_id not in running and len(running - {None}) >= self.max_adapters:
            return False
        adapter = self.residency.forest.get(req.lora_id)
        if adapter.resident:
            return True
        adder = self._adder
        assert adder is not None
        if adder.budget_state() != AddReqResult.CONTINUE:
            return False
        self.fit(req)  # again: adapters may have been pinned since
        # As PrefillAdder.add_one_req counts, with nothing of it in the cache of the device.
        num_tokens = len(req.origin_input_ids) + len(req.output_ids) + adder.per_req_token_overhead
        left = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        wanted = adapter.num_slots + num_tokens + min(left, CLIP_MAX_NEW_TOKENS)
        return wanted < adder.rem_total_tokens and self.residency.place(req.lora_id)

    def _refused(self, req: Req, waiting: list[Req]) -> None:
        since = self._first_refused_at.setdefault(req.rid, self._num_admitted)
        if self._holder is None and self._num_admitted - since >= MAX_BYPASS:
            self._holder = req
            logger.info("request %s was passed by %d others: they wait now", req.rid, MAX_BYPASS)
        if len(self._first_refused_at) > 2 * len(waiting):  # some were aborted
            alive = {waiter.rid for waiter in waiting}
            self._first_refused_at = {
                rid: since for rid, since in self._first_refused_at.items() if rid in alive
            }

    def _forget(self, req: Req) -> None:
        self._first_refused_at.pop(req.rid, None)
        if self._holder is req:
            self._holder = None


def begin_pass(result: None, self: PrefillAdder, *_: Any, **__: Any) -> None:
    """After ``PrefillAdder.__init__``: its budget is the one to admit by."""
    admission = getattr(self.tree_cache, "admission", None)
    if admission is not None:
        admission.begin_pass(self)


def admit(self: Scheduler, req: Req, running_loras: set[str | None]) -> bool:
    """Instead of ``Scheduler.can_schedule_lora_req``, which counts slots and drains them."""
    return bool(self.tree_cache.admission.admit(req, self.waiting_queue, running_loras))


def refuse_too_long(result: None, self: Scheduler, req: Req) -> None:
    """After ``Scheduler.init_req_max_new_tokens``: what the pool holds beside the adapter."""
    admission = getattr(self.tree_cache, "admission", None)
    if admission is not None:
        admission.fit(req)


def add_statistics(result: Any, self: Scheduler, recv_req: Any) -> Any:
    """After ``Scheduler.get_internal_state``: ours under ``elora``, shown by /server_info."""
    manager = self.tp_worker.model_runner.lora_manager
    if isinstance(manager, EloraLoRAManager) and manager.residency is not None:
        result.internal_state["elora"] = {
            **manager.residency.statistics(),
            "max_adapters_in_batch": manager.max_adapters_in_batch,
            "checks": manager.num_checks,
        }
    return result
