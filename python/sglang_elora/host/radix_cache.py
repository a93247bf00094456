"""ELORA's radix cache: SGLang's unified tree over one pool of KV and adapters.

Registered as radix-cache backend ``elora``. The tree core (``tree_core.py``) and the component of
full attention (``full_component.py``) are subclasses of SGLang's Python ones; everything they do
not mention is SGLang's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.tree_core_registry import register_tree_core_backend
from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory
from typing_extensions import override

from sglang_elora.config import EloraConfig
from sglang_elora.host import compatibility
from sglang_elora.host.adapter_memory import arena_for, position_of
from sglang_elora.host.admission import Admission
from sglang_elora.host.full_component import EloraFullComponent, evict_without_copies
from sglang_elora.host.kv_events import AdapterMoves
from sglang_elora.host.lora_manager import EloraLoRAManager
from sglang_elora.host.measure import Measure
from sglang_elora.host.policies import make_policy
from sglang_elora.host.residency import Residency
from sglang_elora.host.swapper import Swapper
from sglang_elora.host.tree_core import EloraTreeCore
from sglang_elora.policy import Term
from sglang_elora.swapper import HostTier
from sglang_elora.tree.sessions import Sessions

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

logger = logging.getLogger(__name__)

BACKEND = "elora"


class EloraRadixCache(UnifiedRadixCache):
    """SGLang's cache, which also tells the tree where the turns of a session end."""

    tree_core: EloraTreeCore
    adapter_moves: AdapterMoves | None = None  # None: not to be told
    _turn_end: NodeId | None = None  # of the request that is put into the tree

    @override
    def take_events(self) -> list[Any]:
        moves = [] if self.adapter_moves is None else self.adapter_moves.take()
        return [*super().take_events(), *moves]

    def start_loads(self) -> None:
        """Start the queued loads of KV outside of a batch; later batches wait for them."""
        super().ready_to_load_host_cache()

    @override
    def ready_to_load_host_cache(self) -> int:
        """Start the queued loads of KV, and return what the next batch has to wait for.

        Loads run one after the other on one stream, so the newest one's layers stand for those of
        all before it, also of loads that ``start_loads`` began or whose batch was never formed.

        Returns:
            The index of the newest load in the controller's ``layer_done_counter``, -1 if none is
            under way.
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
        """What an allocation lacks, in one step; SGLang's walk for what is lacking after it."""
        evicted = 0
        if allocation_reclaim_satisfied is None and self.tree_core.full.keeps_order:
            allocator = self.token_to_kv_pool_allocator
            wanted = allocator.available_size() + params.num_tokens
            evicted, _ = evict_without_copies(self, params.num_tokens)
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
        """Nothing where a policy orders evictions: it counts requests, and knows who waits."""
        if self.tree_core.policy is None:
            super().touch_prefix(key)

    @override
    def checkpoint_into_tree(self, req: Req, *, up_to: int, **options: Any) -> None:
        self._turn_end = None
        super().checkpoint_into_tree(req, up_to=up_to, **options)
        node = None if self._turn_end is None else self.tree_core.find(self._turn_end)
        if node is not None and req.finished():
            self.sessions.turn(str(req.session_id), node)

    @override
    def insert(self, params: InsertParams) -> InsertResult:
        result: InsertResult = super().insert(params)
        if params.session_id is not None and self._turn_end is None:
            self._turn_end = result.last_device_node  # of the whole turn; its prompt comes next
        return result

    @property
    def sessions(self) -> Sessions[UnifiedTreeNode]:
        return self.tree_core.sessions


def register_backend() -> None:
    """Make ``--radix-cache-backend elora`` known. Once per process."""
    register_tree_core_backend(BACKEND, EloraTreeCore)
    register_radix_cache_backend(BACKEND, create_cache)


def create_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build our cache and give the LoRA manager its place in it.

    Without LoRA, SGLang's cache is built where the model or another flag asks for a special one.
    """
    manager = ctx.tp_worker.model_runner.lora_manager
    if manager is None and (reason := _why_not_ours(ctx)) is not None:
        logger.warning("The radix cache is SGLang's, not ELORA's: %s", reason)
        return default_radix_cache_factory(ctx)
    if manager is not None:
        compatibility.check_pool(ctx)
    use_elora_tree(ctx.params)
    cache: Any = create_unified_radix_cache(ctx, cache_class=EloraRadixCache)
    if manager is not None:
        assert isinstance(manager, EloraLoRAManager), type(manager)
        config = EloraConfig.from_env(os.environ)
        core: EloraTreeCore = cache.tree_core
        stream = ctx.tp_worker.model_runner.forward_stream
        is_async = str(ctx.params.token_to_kv_pool_allocator.device) != "cpu"
        cache.measure = Measure(cache, is_async=is_async)
        policy = make_policy(config, cache.measure, core)
        core.use_policy(policy, pool_slots=ctx.params.token_to_kv_pool_allocator.size)
        core.keeps_dependency = Term.DEPENDENCY.value not in config.policy_terms_off
        device = str(ctx.params.token_to_kv_pool_allocator.device)
        host = HostTier(
            arena_for(manager, int(config.host_gb * 1e9), device),
            core.adapter_priority,
            position_of(core.forest),
            core.forest.touch,
        )
        residency = Residency(cache, manager.dtype, host, stream)
        manager.bind(residency, cache.measure)
        if config.adapter_events:
            cache.adapter_moves = AdapterMoves(residency)
        cache.swapper = Swapper(residency, cache.measure)
        cache.admission = Admission(residency, cache.swapper, manager.lora_backend.max_adapters)
    return cache


def _why_not_ours(ctx: TreeCacheBuildContext) -> str | None:
    if ctx.disable_radix_cache:
        return "--disable-radix-cache"
    if ctx.is_hybrid_swa or ctx.is_hybrid_ssm:
        return "the model mixes full attention with sliding windows or state spaces"
    memory = get_memory()
    for flag in ("enable_lmcache", "enable_flexkv"):
        if getattr(memory, flag):
            return f"--{flag.replace('_', '-')} brings its own"
    return None


def use_elora_tree(params: Any) -> None:
    """Have a ``UnifiedRadixCache`` built from these ``CacheInitParams`` use our classes."""
    params.component_registry_override = {ComponentType.FULL: EloraFullComponent}
    params.tree_core_backend = BACKEND
