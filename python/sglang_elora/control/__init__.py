"""Between tokenizer and scheduler processes: hints one way, state the other. No SGLang in here."""

from sglang_elora.control.announcer import Announcer
from sglang_elora.control.counters import Counters
from sglang_elora.control.hint_gate import HintGate
from sglang_elora.control.histogram import Histogram
from sglang_elora.control.mirror import StateMirror
from sglang_elora.control.state import AdapterState, Changes, PoolState, Tier

__all__ = [
    "AdapterState",
    "Announcer",
    "Changes",
    "Counters",
    "HintGate",
    "Histogram",
    "PoolState",
    "StateMirror",
    "Tier",
]
