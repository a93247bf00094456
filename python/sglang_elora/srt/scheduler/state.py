"""The state of adapters and pool, for state requests over the control channel."""

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
"""Most adapters in one answer, about 0.5 ms of the scheduler's time. The client requests the
others separately. More lengthen the step."""


def changes_since(residency: Residency, scheduler: Scheduler, num_changes: int) -> Changes:
    """State of the first ``MOST_ROWS`` adapters changed after change ``num_changes``, and of the
    pool."""
    changed = residency.adapter_table.changed_since(num_changes)
    told = changed[:MOST_ROWS]
    return Changes(
        version=told[-1][1] if told else num_changes,
        more=len(changed) > len(told),
        adapters=[adapter_state(residency, adapter_id) for adapter_id, _ in told],
        pool=pool_state(residency, scheduler),
    )


def adapter_state(residency: Residency, adapter_id: str) -> AdapterState:
    adapter = residency.adapter_table.get(adapter_id)
    host = residency.host
    return AdapterState(
        id=adapter_id,
        tier=residency.tier_of(adapter_id),
        pinned=adapter.pinned,
        slots=adapter.num_slots if adapter.resident else 0,
        host_bytes=host.get(adapter_id).nbytes if adapter_id in host else 0,
        kv_tokens_device=adapter.device_tokens,
        kv_tokens_host=adapter.host_tokens,
        visits=adapter.num_requests,
        last_used_s=adapter.used_s,
        num_dropped_weights=adapter.num_dropped,
        is_activated=bool(adapter.invocation),
        shared_tokens=adapter.shared_tokens,
        computed_tokens=adapter.computed_tokens,
        generated_tokens=adapter.generated_tokens,
    )


def pool_state(residency: Residency, scheduler: Scheduler) -> PoolState:
    adapter_table, host = residency.adapter_table, residency.host
    running = [req for req in scheduler.running_batch.reqs if not req.finished()]
    return PoolState(
        slots=residency.pool_slots,
        free=residency.allocator.available_size(),
        adapters=adapter_table.resident_slots,
        kv=adapter_table.device_tokens,
        kv_base=adapter_table.base.device_tokens,
        kv_host=adapter_table.host_tokens,
        num_adapters=len(adapter_table),
        num_on_device=adapter_table.num_resident,
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
    """Add ELORA's statistics as ``elora``, shown by /server_info. Runs after
    ``Scheduler.get_internal_state``."""
    elora = elora_of(self)
    if elora is not None:
        manager, costs = self.tp_worker.model_runner.lora_manager, elora.measured.costs
        result.internal_state["elora"] = {
            **elora.residency.statistics(),
            "recompute_ns_per_token": round(1e9 * costs.recompute),
            "load_ns_per_slot": round(1e9 * costs.load),
            "max_adapters_in_batch": manager.max_adapters_in_batch,
            "checks": manager.num_checks,
        }
    return result
