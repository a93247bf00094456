"""ELORA's radix cache: SGLang's unified tree, with its leaves kept in eviction order.

Registered as radix-cache backend ``elora``. The tree core and the component of full attention are
subclasses of SGLang's Python ones; everything they do not mention is SGLang's.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.components.full import FullComponent
from sglang.srt.mem_cache.unified_cache.tree_core_registry import register_tree_core_backend
from sglang.srt.mem_cache.unified_cache.unified_tree_core import (
    NodeId,
    UnifiedTreeCore,
    UnifiedTreeNode,
)
from sglang.srt.runtime_context import get_memory

from sglang_elora.tree import LeafOrder

logger = logging.getLogger(__name__)

BACKEND = "elora"

ORDERED_POLICIES = frozenset({"lru", "lfu", "fifo", "slru"})
"""Values of --radix-eviction-policy under which a node's priority never falls while it is cached.

Under the others (mru, filo, priority, tlru), and with sessions in the radix cache, SGLang's scan of
all leaves stays.
"""

_Frees = dict[ComponentType, list[torch.Tensor]]
_Tracker = dict[ComponentType, int]


def register_backend() -> None:
    """Make ``--radix-cache-backend elora`` known. Once per process."""
    register_tree_core_backend(BACKEND, EloraTreeCore)
    register_radix_cache_backend(BACKEND, create_cache)


def create_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Build our cache, or SGLang's where the model or another flag asks for a special one."""
    reason = _why_not_ours(ctx)
    if reason is not None:
        logger.warning("The radix cache is SGLang's, not ELORA's: %s", reason)
        return default_radix_cache_factory(ctx)
    use_elora_tree(ctx.params)
    return create_unified_radix_cache(ctx)


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


class EloraTreeCore(UnifiedTreeCore):
    """The Python tree core, whose sets of evictable leaves are ordered."""

    def reset(self) -> None:
        super().reset()
        full = cast(EloraFullComponent, self.components_by_type[ComponentType.FULL])
        if full.keeps_order:
            self.evictable_device_leaves = LeafOrder(self.eviction_strategy.get_priority)
            self.evictable_host_leaves = LeafOrder(self.eviction_strategy.get_priority)

    def check_invariants(self) -> None:
        """Recompute the order of both tiers. Raises RuntimeError on a difference."""
        for leaves in (self.evictable_device_leaves, self.evictable_host_leaves):
            if isinstance(leaves, LeafOrder):
                leaves.check_invariants()


class EloraFullComponent(FullComponent):
    """Full attention: takes eviction victims from the order instead of sorting all leaves."""

    def __init__(self, cache: Any, params: Any) -> None:
        super().__init__(cache, params)
        self.keeps_order = (
            params.eviction_policy.lower() in ORDERED_POLICIES
            and not params.enable_session_radix_cache
        )
        self._tokens_wanted = 0

    def _evict_device_start(self, request_cnt: int) -> None:
        if not self.keeps_order:
            super()._evict_device_start(request_cnt)
            return
        self._tokens_wanted = request_cnt

    def _evict_device_next_node(
        self, tracker: _Tracker, device_frees: _Frees, host_frees: _Frees
    ) -> NodeId | None:
        if not self.keeps_order:
            return super()._evict_device_next_node(tracker, device_frees, host_frees)
        if tracker[self.component_type] >= self._tokens_wanted:
            return None
        leaf = self._order(self.tree_core.evictable_device_leaves).take_lowest()
        return None if leaf is None else leaf.id

    def _evict_device_end(self) -> None:
        if not self.keeps_order:
            super()._evict_device_end()
            return
        self._order(self.tree_core.evictable_device_leaves).give_back()

    def drive_host_eviction(
        self, num_tokens: int, tracker: _Tracker, device_frees: _Frees, host_frees: _Frees
    ) -> None:
        """Free host tokens, leaf by leaf in eviction order, until ``num_tokens`` are free."""
        if not self.keeps_order:
            super().drive_host_eviction(num_tokens, tracker, device_frees, host_frees)
            return
        leaves = self._order(self.tree_core.evictable_host_leaves)
        while tracker[self.component_type] < num_tokens:
            leaf = leaves.take_lowest()
            if leaf is None:
                break
            self.tree_core._evict_host_leaf(leaf, tracker, device_frees, host_frees)
        leaves.give_back()

    @staticmethod
    def _order(leaves: set[UnifiedTreeNode]) -> LeafOrder[UnifiedTreeNode]:
        return cast("LeafOrder[UnifiedTreeNode]", leaves)
