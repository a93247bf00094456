"""Numbers of loads and evictions of each adapter, from a server's log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LOAD_LINE = re.compile(r"\] load (\S+) into (\d+) slots$", re.MULTILINE)
_EVICT_LINE = re.compile(r"\] evict (\S+)$", re.MULTILINE)
"""Patterns of the lines that srt/mem_cache/residency.py logs at level info."""


@dataclass(frozen=True, slots=True)
class AdapterMoves:
    """Numbers of loads of one adapter to the device, and of its evictions."""

    num_slots: int  # pool slots that its weights take; 0 if it was never loaded
    num_loads: int
    num_evictions: int


def adapter_moves(log_path: Path, adapters: Iterable[str]) -> dict[str, AdapterMoves] | None:
    """Loads and evictions by adapter; None if the log has none, as with a level above info.

    Each rank of a tensor-parallel server logs its own loads, and all are counted.
    """
    log = log_path.read_text(errors="replace")
    loaded = _LOAD_LINE.findall(log)
    if not loaded:
        return None
    slots = {name: int(num_slots) for name, num_slots in loaded}
    loads, evictions = Counter(name for name, _ in loaded), Counter(_EVICT_LINE.findall(log))
    return {
        name: AdapterMoves(slots.get(name, 0), loads[name], evictions[name]) for name in adapters
    }
