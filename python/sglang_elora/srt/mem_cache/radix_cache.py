"""ELORA's radix cache: SGLang's unified tree over one pool of KV and adapters.

Registered as radix-cache backend ``elora``. The tree core (``tree_core.py``) and the full-attention
component (``full_component.py``) are subclasses of SGLang's Python ones and inherit everything that
they do not override.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from typing_extensions import override

from sglang_elora.srt.mem_cache import activated
from sglang_elora.srt.mem_cache.full_component import EloraFullComponent, evict_without_copies
from sglang_elora.srt.mem_cache.kv_events import AdapterMoves
from sglang_elora.srt.mem_cache.kv_pool import slot_allocator
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore
from sglang_elora.tree import ActivatedNamespace, Eviction, Sessions

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

BACKEND = "elora"


class EloraRadixCache(UnifiedRadixCache):
    """SGLang's cache, with sessions, adapter events and one-step evictions for allocations."""

    tree_core: EloraTreeCore
    elora: Any = None  # set by ``scheduler.assembly``, read by ``scheduler.parts.elora_of``
    adapter_moves: AdapterMoves | None = None  # None: adapter events are off
    _inserted: list[NodeId] | None = None  # end nodes of inserts in the current checkpoint

    @override
    def take_events(self) -> list[Any]:
        moves = [] if self.adapter_moves is None else self.adapter_moves.take()
        return [*super().take_events(), *moves]

    def start_loads(self) -> None:
        """Start the queued loads of KV without a batch; later batches wait for them."""
        super().ready_to_load_host_cache()

    @override
    def ready_to_load_host_cache(self) -> int:
        """Start the queued loads of KV and return the load that the next batch has to wait for.

        Loads run in order on one stream, so to wait for the newest one covers all earlier ones,
        including loads started by ``start_loads`` and loads whose batch was never formed.

        Returns:
            Index of the newest load in the controller's ``layer_done_counter``; -1 if no load is
            in progress.
        """
        index: int = super().ready_to_load_host_cache()
        if index >= 0 or self.cache_controller is None:
            return index
        loads = self.cache_controller.layer_done_counter
        newest: int = loads.producer_index
        if newest < 0 or loads.events[newest].finish_event.query():
            return index
        return newest

    @override
    def evict_for_alloc(
        self,
        params: EvictParams,
        *,
        allocation_reclaim_satisfied: Callable[[], bool] | None = None,
    ) -> EvictResult:
        """Evict what an allocation needs in one step; SGLang's walk evicts the remainder."""
        evicted = 0
        only_kv = not (params.swa_num_tokens or params.mamba_num or allocation_reclaim_satisfied)
        if only_kv and self.tree_core.full.keeps_order:
            allocator = slot_allocator(self.token_to_kv_pool_allocator)
            wanted = allocator.available_size() + params.num_tokens
            evicted = evict_without_copies(self, Eviction(params.num_tokens)).num_slots
            lacking = wanted - allocator.available_size()
            if lacking <= 0:
                return EvictResult(num_tokens_evicted=evicted)
            params = replace(params, num_tokens=lacking)
        result: EvictResult = super().evict_for_alloc(
            params, allocation_reclaim_satisfied=allocation_reclaim_satisfied
        )
        result.num_tokens_evicted += evicted
        return result

    @override
    def touch_prefix(self, key: RadixKey) -> None:
        """Do nothing if a policy is used: it counts each request once (``OrderedTreeCore.visit``)
        and knows which entries queued requests need."""
        if self.tree_core.policy is None:
            super().touch_prefix(key)

    @override
    def checkpoint_into_tree(self, req: Req, *, up_to: int, **options: Any) -> None:
        ends: list[NodeId] = []
        self._inserted = ends
        try:
            super().checkpoint_into_tree(req, up_to=up_to, **options)
        finally:
            self._inserted = None
        node = self.tree_core.find(ends[0]) if ends else None
        if node is not None and req.finished():
            self.tree_core.end_turn(node)
            self.tree_core.adapter_table.answered(req.lora_id, len(req.output_ids))
            if req.session_id is not None:
                self.sessions.turn(str(req.session_id), node)

    @override
    def insert(self, params: InsertParams) -> InsertResult:
        # A checkpoint inserts a request as a whole, and then its prompt, which splits the node.
        ends = self._inserted
        self.tree_core.splits_at_prompt_end = bool(ends)
        try:
            if isinstance(params.key.extra_key, ActivatedNamespace):
                result: InsertResult = activated.insert(self.tree_core, super().insert, params)
            else:
                result = super().insert(params)
        finally:
            self.tree_core.splits_at_prompt_end = False
        if ends is not None:
            ends.append(result.last_device_node)
        return result

    @override
    def lock(
        self, node_id: NodeId, skip_lock_components: Sequence[ComponentType] = ()
    ) -> TreeLock | None:
        if isinstance(node_id, activated.NodeWithAdapter):
            self.tree_core.inc_full_pin(self.tree_core.node_of(node_id.adapter_id).id)
        return super().lock(node_id, skip_lock_components)

    @override
    def unlock(self, lock: TreeLock | None) -> None:
        super().unlock(lock)
        if lock is not None and isinstance(lock.node, activated.NodeWithAdapter):
            self.tree_core.dec_full_pin(self.tree_core.node_of(lock.node.adapter_id).id)

    @property
    def sessions(self) -> Sessions[UnifiedTreeNode]:
        return self.tree_core.sessions


def use_elora_tree(params: Any) -> None:
    """Set these ``CacheInitParams`` so that a ``UnifiedRadixCache`` built from them uses the
    ELORA tree core and component."""
    params.component_registry_override = {ComponentType.FULL: EloraFullComponent}
    params.tree_core_backend = BACKEND
