"""Builds the cache and the other ELORA components of a scheduler, after the KV pool."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.unified_cache.tree_core_registry import register_tree_core_backend
from sglang.srt.runtime_context import get_memory, get_spec

from sglang_elora.config import active_config
from sglang_elora.policy import PolicyContext, make_policy
from sglang_elora.srt.arguments import compatibility
from sglang_elora.srt.lora.adapter_memory import arena_for
from sglang_elora.srt.lora.lora_manager import EloraLoRAManager
from sglang_elora.srt.measured_costs import MeasuredCosts
from sglang_elora.srt.mem_cache.kv_events import AdapterMoves
from sglang_elora.srt.mem_cache.kv_pool import slot_allocator
from sglang_elora.srt.mem_cache.radix_cache import BACKEND, EloraRadixCache, use_elora_tree
from sglang_elora.srt.mem_cache.residency import Residency
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore
from sglang_elora.srt.scheduler.admission import Admission
from sglang_elora.srt.scheduler.parts import Elora
from sglang_elora.srt.scheduler.swapper import Swapper
from sglang_elora.swapper.host_tier import HostTier

logger = logging.getLogger(__name__)


def register_backend() -> None:
    """Register ``--radix-cache-backend elora``. Call once per process."""
    register_tree_core_backend(BACKEND, EloraTreeCore)
    register_radix_cache_backend(BACKEND, create_cache)


def create_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the ELORA cache and bind the LoRA manager to it.

    Without LoRA, SGLang's cache is built if the model or another flag requires a special one.
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
        config = active_config()
        core: EloraTreeCore = cache.tree_core
        stream = ctx.tp_worker.model_runner.forward_stream
        device = str(ctx.params.token_to_kv_pool_allocator.device)
        is_async = device != "cpu" or bool(config.check_streams)
        measure = MeasuredCosts(cache, is_async=is_async)
        context = PolicyContext(
            measure.costs,
            needed_adapters=lambda: measure.needed_adapters,
            resident_adapters=lambda: core.adapter_table.num_resident,
            is_held=core.is_held,
            writes_back=core.is_write_back,
        )
        policy = make_policy(config.policy, context)
        slots = slot_allocator(ctx.params.token_to_kv_pool_allocator)
        core.use_policy(policy, pool_slots=slots.size)
        host = HostTier(
            arena_for(manager, int(config.host_gb * 1e9), device),
            core.image_priority,
            core.adapter_table.image_position,
            core.adapter_table.touch,
        )
        residency = Residency(cache, manager.dtype, host, stream, is_async=is_async)
        manager.bind(residency, measure)
        if config.adapter_events:
            cache.adapter_moves = AdapterMoves(residency)
        swapper = Swapper(residency, measure)
        speculates = get_spec().speculative_algorithm is not None
        num_drafted = get_alloc_reserve_per_decode() if speculates else 0
        admission = Admission(
            residency, swapper, manager.lora_backend.max_adapters, num_drafted=num_drafted
        )
        cache.elora = Elora(residency, measure, swapper, admission)
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
