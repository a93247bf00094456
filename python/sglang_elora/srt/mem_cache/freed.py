"""What evictions free, as SGLang's tree core hands it on."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.unified_cache.cache_action import CacheAction, ComponentAction
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import BaseEvictionResult

Tracker = dict[ComponentType, int]
Slots = dict[ComponentType, list[torch.Tensor]]
Actions = list[CacheAction | ComponentAction]
Freed = tuple[Tracker, Slots, Slots, Actions]
"""Number of tokens, slots of the device, slots of the host, and what the cache has to do: each
eviction adds its own to them."""


def parts_of(result: BaseEvictionResult) -> Freed:
    """Of the result of a step, which SGLang's cache drains (``_apply_eviction_result``)."""
    return result.tracker, result.device_frees, result.host_frees, result.cache_actions
