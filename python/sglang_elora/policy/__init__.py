"""Eviction policies: which cache entry is the next victim. Pure functions of numbers."""

from __future__ import annotations

__all__ = [
    "GDSF",
    "LRU",
    "NEVER",
    "CacheEntry",
    "Costs",
    "Elora",
    "EloraPaper",
    "Policy",
    "PolicyContext",
    "SessionState",
    "Term",
    "make_policy",
    "register",
]

from sglang_elora.policy.cache_entry import NEVER, CacheEntry, SessionState
from sglang_elora.policy.elora import Elora
from sglang_elora.policy.elora_paper import EloraPaper, Term
from sglang_elora.policy.gdsf import GDSF
from sglang_elora.policy.lru import LRU
from sglang_elora.policy.policy import Costs, Policy, PolicyContext
from sglang_elora.policy.registry import make_policy, register
