"""The kinds of SGLang's KV pools that can hold adapters, and the layout of their memory.

To support another kind of pool, accept it in ``why_unsupported`` and add its tensors to
``buffers_of``. No other file depends on the layout of a pool, except the checks of
``--elora-check-streams``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_schedule

from sglang_elora.pages import KVPlanes


def why_unsupported(allocator: Any) -> str | None:
    """The reason why the KV pool of this allocator cannot hold adapters; None if it can."""
    pool = allocator.get_kvcache()
    if isinstance(pool, SWAKVPool):
        if type(allocator) is not SWATokenToKVPoolAllocator or allocator.swa_req_ring:
            return "sliding windows have a pool of a kind that was not tested with adapters"
        if not pool.full_layer_nums:
            return "all layers have sliding windows"
    pool = _of_attention(pool)
    if type(pool) is MLATokenToKVPool:
        return "the KV pool is of sparse attention" if pool.use_dsa else None
    if type(pool) is not MHATokenToKVPool:
        return f"the KV pool is a {type(pool).__name__}, not one buffer each for K and V by layer"
    if pool.kv_cache_layout != "nhd":
        return f"the KV pool has layout {pool.kv_cache_layout}, where slots are not contiguous"
    if not isinstance(pool.quant_method, UnquantizedKVCacheMethod):
        return "the KV cache has scales beside the pool"
    return None


def planes_of(pool: Any, weight_dtype: torch.dtype) -> KVPlanes:
    """The memory of a supported pool, as planes of slots that hold weights of this dtype."""
    return KVPlanes(buffers_of(pool), weight_dtype)


def buffers_of(pool: Any) -> Sequence[Sequence[torch.Tensor]]:
    """The tensors of a supported pool by plane and layer, each ``[slots, ...]``: K and V, or the
    one of multi-head latent attention."""
    pool = _of_attention(pool)
    if isinstance(pool, MLATokenToKVPool):
        return (pool.kv_buffer,)
    return pool.k_buffer, pool.v_buffer


def _of_attention(pool: Any) -> Any:
    """The part of a pool that holds KV of whole prompts, if other layers have states or windows."""
    return pool.full_kv_pool if type(pool) in (HybridLinearKVPool, SWAKVPool) else pool


def slot_allocator(allocator: Any) -> Any:
    """The allocator of the slots that adapters share with KV of whole prompts."""
    if isinstance(allocator, SWATokenToKVPoolAllocator):
        return allocator.full_attn_allocator
    return allocator


def num_pool_layers(server_args: Any, num_layers: int) -> int:
    """How many layers the KV pool of the server's model will have.

    Args:
        num_layers: Layers of the model.
    """
    config = model_config_of(server_args)
    has_window_pool = config.is_hybrid_swa and not get_schedule().disable_hybrid_swa_memory
    hybrid = config if has_window_pool else mambaish_config(config)
    return num_layers if hybrid is None else len(hybrid.full_attention_layer_ids)
