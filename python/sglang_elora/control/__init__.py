"""Hints from tokenizer to scheduler processes, and state back. Does not import SGLang."""

from sglang_elora.control.announcer import Announcer
from sglang_elora.control.counters import Counters
from sglang_elora.control.draining import Draining
from sglang_elora.control.hint_limiter import HintLimiter
from sglang_elora.control.histogram import Histogram
from sglang_elora.control.mirror import StateMirror
from sglang_elora.control.state import AdapterState, Changes, PoolState, Tier

__all__ = [
    "AdapterState",
    "Announcer",
    "Changes",
    "Counters",
    "Draining",
    "HintLimiter",
    "Histogram",
    "PoolState",
    "StateMirror",
    "Tier",
]
