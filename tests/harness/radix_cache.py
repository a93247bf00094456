"""SGLang's unified radix cache and ours, without a server, driven by the same operations."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any


@cache
def sglang() -> Any:
    """What these tests need of SGLang, imported at first use: it warns, and takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from sglang.srt.mem_cache import base_prefix_cache
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        from sglang_elora.srt.mem_cache.radix_cache import EloraRadixCache, use_elora_tree
        from sglang_elora.srt.scheduler.assembly import register_backend

        register_backend()
    return SimpleNamespace(
        torch=torch,
        base=base_prefix_cache,
        TokenToKVPoolAllocator=TokenToKVPoolAllocator,
        PagedTokenToKVPoolAllocator=PagedTokenToKVPoolAllocator,
        CacheInitParams=CacheInitParams,
        EloraRadixCache=EloraRadixCache,
        ReqToTokenPool=ReqToTokenPool,
        RadixKey=RadixKey,
        ComponentType=ComponentType,
        UnifiedRadixCache=UnifiedRadixCache,
        use_elora_tree=use_elora_tree,
    )


class Cache:
    """One cache over ``num_slots`` slots.

    Args:
        core: ``elora``, or SGLang's ``python`` or ``rust``.
        policy: Value of --radix-eviction-policy.
        kv_pool: The KV pool of the slots, for tests that copy to them.
        page_size: Slots of a page; ``num_slots`` is a multiple of it.
    """

    def __init__(
        self,
        core: str,
        num_slots: int,
        policy: str = "lru",
        kv_pool: Any = None,
        device: str = "cpu",
        page_size: int = 1,
    ) -> None:
        self._sglang = sglang()
        self.salt: str | None = None  # of the requests that follow
        options = {
            "dtype": self._sglang.torch.float32,
            "device": device,
            "kvcache": kv_pool,
            "need_sort": False,
        }
        self.allocator = (
            self._sglang.TokenToKVPoolAllocator(num_slots, **options)
            if page_size == 1
            else self._sglang.PagedTokenToKVPoolAllocator(num_slots, page_size, **options)
        )
        self.rows = self._sglang.ReqToTokenPool(8, 4096, device, False)
        self.params = params = self._sglang.CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            eviction_policy=policy,
            tree_components=(self._sglang.ComponentType.FULL,),
        )
        if core == "elora":
            self._sglang.use_elora_tree(params)
            self.tree = self._sglang.EloraRadixCache(params)
        else:
            params.tree_core_backend = core
            self.tree = self._sglang.UnifiedRadixCache(params)

    def insert(self, tokens: Sequence[int], namespace: str | None = None) -> bool:
        """Cache the KV of ``tokens``, as a finished request does; False if slots ran out."""
        base = self._sglang.base
        slots = self.allocator.alloc(len(tokens))
        if slots is None:
            return False
        self.tree.insert(base.InsertParams(key=self._key(tokens, namespace), value=slots))
        return True

    def match(self, tokens: Sequence[int], namespace: str | None = None) -> Any:
        params = self._sglang.base.MatchPrefixParams(key=self._key(tokens, namespace))
        return self.tree.match_prefix(params)

    def slots(self, match: Any, namespace: str | None = None) -> Any:
        """Slots of the device that hold what was matched: int64 ``[tokens]``."""
        core = self.tree.tree_core
        root = core.root_node_handle(namespace)
        return core.collect_full_device_indices(match.last_device_node, root)

    def evict(self, num_tokens: int) -> int:
        params = self._sglang.base.EvictParams(num_tokens=num_tokens)
        return int(self.tree.evict(params).num_tokens_evicted)

    def lock(self, node: Any) -> Any:
        return self.tree.inc_lock_ref(node)

    def unlock(self, node: Any, receipt: Any) -> None:
        self.tree.dec_lock_ref(node, receipt.to_dec_params())

    def free_slots(self) -> list[int]:
        """The allocator's free list in order: it shows what was evicted, and when."""
        size, pages = self.allocator.page_size, self.allocator.get_all_free_pages().tolist()
        return [page * size + i for page in pages for i in range(size)]

    def _key(self, tokens: Sequence[int], namespace: str | None) -> Any:
        return self._sglang.RadixKey(array("q", tokens), namespace, cache_salt=self.salt)
