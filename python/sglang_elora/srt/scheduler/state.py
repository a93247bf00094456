"""What the scheduler tells of adapters and pool, to whoever asks over the control channel."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from sglang_elora.control import AdapterState, Changes, PoolState
from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.srt.scheduler.parts import elora_of
from sglang_elora.swapper.planner import LOOKAHEAD

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

MOST_ROWS = 256
"""Adapters in one answer: some 0.5 ms of the scheduler's time. Whoever wants more asks again."""


def changes_since(residency: Residency, scheduler: Scheduler, num_changes: int) -> Changes:
    """Of the adapters that changed since there were so many changes, the first ``MOST_ROWS``."""
    changed = residency.forest.changed_since(num_changes)
    told = changed[:MOST_ROWS]
    return Changes(
        version=told[-1][1] if told else num_changes,
        more=len(changed) > len(told),
        adapters=[adapter_state(residency, uid) for uid, _ in told],
        pool=pool_state(residency, scheduler),
    )


def adapter_state(residency: Residency, uid: str) -> AdapterState:
    adapter = residency.forest.get(uid)
    host = residency.host
    return AdapterState(
        id=uid,
        tier=residency.tier_of(uid),
        pinned=adapter.pinned,
        slots=adapter.num_slots if adapter.resident else 0,
        host_bytes=host.get(uid).nbytes if uid in host else 0,
        kv_tokens_device=adapter.device_tokens,
        kv_tokens_host=adapter.host_tokens,
        visits=adapter.num_requests,
        last_used_s=adapter.used_s,
    )


def pool_state(residency: Residency, scheduler: Scheduler) -> PoolState:
    forest, host = residency.forest, residency.host
    running = [req for req in scheduler.running_batch.reqs if not req.finished()]
    return PoolState(
        slots=residency.pool_slots,
        free=residency.allocator.available_size(),
        adapters=forest.resident_slots,
        kv=forest.device_tokens,
        kv_base=forest.base.device_tokens,
        kv_host=forest.host_tokens,
        num_adapters=len(forest),
        num_on_device=forest.num_resident,
        num_on_host=len(host),
        adapter_host_bytes=host.num_bytes,
        num_waiting=len(scheduler.waiting_queue),
        num_running=len(running),
        counts=residency.core.counts.flat(),
        waiting=_adapters_of(islice(scheduler.waiting_queue, LOOKAHEAD)),
        running=_adapters_of(running),
        most_in_batch=scheduler.tp_worker.model_runner.lora_manager.max_adapters_in_batch,
        load_s=residency.load_s,
        num_sessions=len(residency.core.sessions),
    )


def _adapters_of(requests: Iterable[Req]) -> list[str]:
    return list({req.lora_id: None for req in requests if req.lora_id is not None})


def add_statistics(result: Any, self: Scheduler, recv_req: Any) -> Any:
    """After ``Scheduler.get_internal_state``: ours under ``elora``, shown by /server_info."""
    elora = elora_of(self)
    if elora is not None:
        manager, costs = self.tp_worker.model_runner.lora_manager, elora.measure.costs
        result.internal_state["elora"] = {
            **elora.residency.statistics(),
            "recompute_ns_per_token": round(1e9 * costs.recompute),
            "load_ns_per_slot": round(1e9 * costs.load),
            "max_adapters_in_batch": manager.max_adapters_in_batch,
            "checks": manager.num_checks,
        }
    return result
