"""Types for the resources that evictions free, as passed through SGLang's tree core."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.unified_cache.cache_action import CacheAction, ComponentAction
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import BaseEvictionResult

Tracker = dict[ComponentType, int]
Slots = dict[ComponentType, list[torch.Tensor]]
Actions = list[CacheAction | ComponentAction]
Freed = tuple[Tracker, Slots, Slots, Actions]
"""Accumulators that each eviction adds to: tokens freed, device slots, host slots, and actions
that the cache has to take."""


def parts_of(result: BaseEvictionResult) -> Freed:
    """The accumulators within a result, which SGLang's cache processes in
    ``_apply_eviction_result``."""
    return result.tracker, result.device_frees, result.host_frees, result.cache_actions
