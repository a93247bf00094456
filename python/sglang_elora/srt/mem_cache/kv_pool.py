"""Which of SGLang's KV pools adapters can live in, and where in their memory.

To support another kind of pool, add it here: a reason less in ``why_unsupported``, and its tensors
in ``planes_of``. No other file knows what a pool is made of, apart from the checks of
``--elora-check-streams``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_elora.pages import KVPlanes


def why_unsupported(pool: Any) -> str | None:
    """Why adapters cannot live in this pool; None if they can.

    Args:
        pool: What ``TokenToKVPoolAllocator.get_kvcache`` returns.
    """
    if type(pool) is not MHATokenToKVPool:
        return f"the KV pool is a {type(pool).__name__}, not one buffer each for K and V by layer"
    if pool.kv_cache_layout != "nhd":
        return f"the KV pool has layout {pool.kv_cache_layout}, where slots are not contiguous"
    if not isinstance(pool.quant_method, UnquantizedKVCacheMethod):
        return "the KV cache has scales beside the pool"
    return None


def planes_of(pool: Any, weight_dtype: torch.dtype) -> KVPlanes:
    """The memory of a supported pool, as planes of slots that hold weights of this dtype."""
    return KVPlanes((pool.k_buffer, pool.v_buffer), weight_dtype)
