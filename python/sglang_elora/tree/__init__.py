"""Data structures of the cache tree: adapters, sessions, eviction order. Imports no sglang or
torch."""

from __future__ import annotations

__all__ = [
    "MAX_REMEMBERED",
    "NOBODY",
    "Adapter",
    "AdapterTable",
    "Eviction",
    "EvictionOrder",
    "Ghosts",
    "PrefixHash",
    "Reason",
    "Sessions",
    "TierOrders",
    "Victims",
    "adapter_of",
    "end_turn",
    "fork",
    "namespace_of",
]

from sglang_elora.tree.adapter_table import Adapter, AdapterTable, adapter_of, namespace_of
from sglang_elora.tree.eviction import (
    MAX_REMEMBERED,
    Eviction,
    Reason,
    TierOrders,
    Victims,
)
from sglang_elora.tree.eviction_order import EvictionOrder
from sglang_elora.tree.ghosts import Ghosts, PrefixHash
from sglang_elora.tree.sessions import NOBODY, Sessions
from sglang_elora.tree.turns import end_turn, fork
