"""An adapter as a node of the cache tree."""

from __future__ import annotations

from array import array

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

from sglang_elora.policy import Item
from sglang_elora.tree import Adapter, namespace_of
from sglang_elora.tree.sessions import NOBODY

FULL = ComponentType.FULL


class AdapterNode(UnifiedTreeNode):
    """An adapter's node. ``value`` is int64 ``[slots]`` on the pool's device, empty if evicted.

    It counts as backed up (its weights are on the host) with no host slots of its own.
    """

    def __init__(self, adapter: Adapter, no_slots: torch.Tensor) -> None:
        super().__init__((FULL,))
        self.sessions, self.num_sessions = NOBODY, 0
        self.adapter = adapter
        self.no_slots = no_slots
        self.key = RadixKey(array("q"), namespace_of(str(adapter.uid)))
        self.hash_value: list[str] = []
        self.event_hash_value: list[str] = []
        self.component_data[FULL].value = no_slots
        self.component_data[FULL].host_value = no_slots

    @property
    def item(self) -> Item:
        return self.adapter.item

    @property
    def slots(self) -> torch.Tensor:
        slots: torch.Tensor = self.component_data[FULL].value
        return slots
