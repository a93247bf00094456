"""An adapter as a node of the cache tree."""

from __future__ import annotations

from array import array
from collections import OrderedDict

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

from sglang_elora.policy import CacheEntry
from sglang_elora.tree import Adapter, namespace_of
from sglang_elora.tree.sessions import NOBODY

FULL = ComponentType.FULL


class AdapterNode(UnifiedTreeNode):
    """An adapter's node. ``value`` is int64 ``[slots]`` on the pool's device, empty if evicted.

    It counts as backed up (its weights are on the host), but has no slots in SGLang's host pool.

    ``kv_nodes`` are all nodes below it by id; ``next_kv`` returns the last one next.
    """

    def __init__(self, adapter: Adapter, no_slots: torch.Tensor) -> None:
        super().__init__((FULL,))
        self.sessions, self.num_sessions = NOBODY, 0
        self.prefix_len = self.prefix_hash = 0
        self.adapter = adapter
        self.no_slots = no_slots
        self.kv_nodes: OrderedDict[int, UnifiedTreeNode] = OrderedDict()
        self.key = RadixKey(array("q"), namespace_of(str(adapter.adapter_id)))
        self.hash_value: list[str] = []
        self.event_hash_value: list[str] = []
        self.component_data[FULL].value = no_slots
        self.component_data[FULL].host_value = no_slots

    @property
    def entry(self) -> CacheEntry:
        return self.adapter.entry

    @property
    def is_locked(self) -> bool:
        """Whether a request or a copy holds the adapter, or it is pinned."""
        return bool(self.component_data[FULL].lock_ref > 0)

    @property
    def slots(self) -> torch.Tensor:
        slots: torch.Tensor = self.component_data[FULL].value
        return slots

    def next_kv(self) -> UnifiedTreeNode:
        """The next KV node: new ones first, then round robin; O(1)."""
        node_id = next(reversed(self.kv_nodes))
        self.kv_nodes.move_to_end(node_id, last=False)
        return self.kv_nodes[node_id]
