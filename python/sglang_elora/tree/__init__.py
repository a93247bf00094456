"""The cache tree's own structures. Nothing here imports sglang or torch."""

from __future__ import annotations

__all__ = [
    "MAX_REMEMBERED",
    "NOBODY",
    "Adapter",
    "AdapterForest",
    "Eviction",
    "EvictionOrders",
    "LeafOrder",
    "Reason",
    "Sessions",
    "Victims",
    "adapter_of",
    "namespace_of",
]

from sglang_elora.tree.adapter_forest import Adapter, AdapterForest, adapter_of, namespace_of
from sglang_elora.tree.eviction import (
    MAX_REMEMBERED,
    Eviction,
    EvictionOrders,
    Reason,
    Victims,
)
from sglang_elora.tree.leaf_order import LeafOrder
from sglang_elora.tree.sessions import NOBODY, Sessions
