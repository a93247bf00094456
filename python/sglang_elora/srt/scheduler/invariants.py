"""``--elora-check``: recomputes all counts of the cache after every scheduler step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

from sglang_elora.control import StateMirror
from sglang_elora.srt.lora.lora_manager import EloraLoRAManager
from sglang_elora.srt.mem_cache.adapter_node import FULL
from sglang_elora.srt.mem_cache.kv_pool import slot_allocator
from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore
from sglang_elora.srt.scheduler.state import adapter_state, changes_since

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

_COMPARED = 128
"""Most adapters whose state is compared in one check."""


def check_step(result: None, self: Scheduler, *arguments: Any) -> None:
    """Check all invariants. Runs after ``Scheduler.process_batch_result`` and ``on_idle``.

    Raises:
        AssertionError: A count differs from the tree, the requests or the allocator, a slot does
            not have exactly one owner, or KV is on the device without its adapter. This ends the
            server on purpose.
    """
    core = getattr(self.tree_cache, "tree_core", None)
    if not isinstance(core, EloraTreeCore):
        return
    # SGLang's check handles loads in progress only with write-back.
    if core.is_write_back or not self.tree_cache.ongoing_load_back:
        self.tree_cache.sanity_check()
    core.check_invariants()
    _check_page_owners(self, core, _live_requests(self, arguments))
    _check_window_owners(self.token_to_kv_pool_allocator, core)
    manager = self.tp_worker.model_runner.lora_manager
    if isinstance(manager, EloraLoRAManager):
        manager.num_checks += 1
        if manager.residency is not None:
            _check_copies(manager.residency)
            _check_state(manager.residency, self, manager.mirror)


def _check_copies(residency: Residency) -> None:
    """Check that the image and the slots of each copy in progress are held until it is settled."""
    residency.host.check_invariants()
    for adapter_id in residency.copies:
        pins = residency.core.node_of(adapter_id).component_data[FULL].lock_ref
        assert pins, f"{residency.name_of(adapter_id)} is being copied and may be evicted"
        assert residency.host.is_held(adapter_id), (
            f"the image of {residency.name_of(adapter_id)} may be dropped"
        )


def _check_state(residency: Residency, scheduler: Scheduler, mirror: StateMirror) -> None:
    """Check that a client which follows the changes (the mirror) has each adapter's true state."""
    loaded = {str(adapter.adapter_id) for adapter in residency.adapter_table}
    while mirror.version < residency.adapter_table.num_changes:
        changes = changes_since(residency, scheduler, mirror.version)
        mirror.apply(changes, loaded)
        if not changes.more:
            break
    compared = random.sample(sorted(loaded), min(len(loaded), _COMPARED))
    truth = {adapter_id: adapter_state(residency, adapter_id) for adapter_id in compared}
    wrong = [row for adapter_id, row in truth.items() if mirror.adapters.get(adapter_id) != row]
    assert not wrong, f"not told: {wrong[:8]}"


def _live_requests(scheduler: Scheduler, arguments: tuple[Any, ...]) -> list[Req]:
    batches: list[ScheduleBatch] = [scheduler.running_batch, scheduler.last_batch, *arguments[:1]]
    requests = [request for batch in batches if batch is not None for request in batch.reqs]
    for batch, _ in getattr(scheduler, "result_queue", ()):
        requests += batch.reqs
    requests.append(scheduler.chunked_req)
    return list({id(r): r for r in requests if r is not None and r.kv.holds_kv}.values())


def _check_page_owners(scheduler: Scheduler, core: EloraTreeCore, requests: list[Req]) -> None:
    """Check that each page has exactly one owner: the free list, a node, a request or an open
    streaming session."""
    allocator = slot_allocator(scheduler.token_to_kv_pool_allocator)
    page_size, rows = allocator.page_size, scheduler.req_to_token_pool.req_to_token
    owned = [allocator.get_all_free_pages(), core.all_values_flatten()[::page_size] // page_size]
    held = [kv for kv in scheduler.tree_cache.session_records().values() if kv.holds_kv]
    for kv in {id(kv): kv for kv in [*held, *(request.kv for request in requests)]}.values():
        row = rows[kv.req_pool_idx, kv.cache_protected_len : kv.kv_allocated_len]
        owned.append(row[::page_size] // page_size)
    there = f"{core.adapter_table.resident_slots} slots of adapters, {len(requests)} requests"
    _check_owned_once(owned, allocator.size // page_size, there)


def _check_owned_once(owned: Sequence[torch.Tensor], num_pages: int, there: str) -> None:
    """Check that each of the pages 1 to ``num_pages`` is among the owned ones exactly once.

    Args:
        owned: Numbers of pages, of all owners.
        there: What the text of an error says of the pool.
    """
    counts = torch.bincount(torch.cat([pages.to(torch.int64).cpu() for pages in owned]))
    counts[0] = 1  # the padding page has no owner
    wrong = (counts != 1).nonzero().flatten().tolist()
    assert len(counts) == num_pages + 1 and not wrong, (
        f"{len(counts) - 1} of {num_pages} pages have owners, these have not exactly one: "
        f"{wrong[:8]} ({there})"
    )


def _check_window_owners(allocator: Any, core: EloraTreeCore) -> None:
    """Check that each page of the sliding windows' pool, if there is one, is free or belongs to one
    page of the other pool, and that none belongs to an adapter's."""
    if not isinstance(allocator, SWATokenToKVPoolAllocator):
        return
    page_size, windows = allocator.page_size, allocator.full_to_swa_index_mapping[:-1]
    pages = windows[(windows > 0) & (windows % page_size == 0)] // page_size
    owned = [allocator.swa_attn_allocator.get_all_free_pages(), pages]
    _check_owned_once(owned, allocator.size_swa // page_size, "sliding windows")
    for adapter in core.adapter_table:
        if adapter.resident:
            slots = core.node_of(str(adapter.adapter_id)).slots
            assert not windows[slots].any(), f"slots of {adapter} have sliding windows"
