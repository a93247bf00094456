"""Data structures of the cache tree: adapters, sessions, eviction order. Imports no sglang or
torch."""

from __future__ import annotations

__all__ = [
    "MAX_REMEMBERED",
    "NOBODY",
    "ActivatedAdapter",
    "ActivatedNamespace",
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
    "base_namespace",
    "end_turn",
    "fork",
    "is_activated",
    "last_occurrence",
    "namespace_of",
    "num_inactive",
]

from sglang_elora.tree.activation import (
    ActivatedAdapter,
    ActivatedNamespace,
    is_activated,
    last_occurrence,
    num_inactive,
)
from sglang_elora.tree.adapter_table import (
    Adapter,
    AdapterTable,
    adapter_of,
    base_namespace,
    namespace_of,
)
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
