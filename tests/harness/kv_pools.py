"""KV pools of SGLang made of given tensors."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch


def pool_of(planes: Sequence[Sequence[torch.Tensor]]) -> Any:
    """The parts of a KV pool that the project reads: K and V of each layer, or the one plane of
    multi-head latent attention.

    Args:
        planes: By plane and layer, ``[slots, ...]``.
    """
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if len(planes) == 2:
        return SimpleNamespace(k_buffer=planes[0], v_buffer=planes[1])
    pool = object.__new__(MLATokenToKVPool)
    (pool.kv_buffer,) = planes
    return pool
