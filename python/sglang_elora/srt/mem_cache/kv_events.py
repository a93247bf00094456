"""Adapter events in SGLang's stream of KV events, for routers that subscribe to it."""

from __future__ import annotations

from sglang_elora.control.events import AdapterMoved, Moves
from sglang_elora.srt.mem_cache.residency import Residency


class AdapterMoves:
    """Collects the changes of adapters' tiers since the last batch of events."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._moves = Moves()
        self._num_changes = 0  # changes of the table processed so far

    def take(self) -> list[AdapterMoved]:
        residency = self._residency
        adapter_table = residency.adapter_table
        if adapter_table.num_changes == self._num_changes:
            return []
        changed = [
            (adapter_id, residency.name_of(adapter_id), residency.tier_of(adapter_id))
            for adapter_id, _ in adapter_table.changed_since(self._num_changes)
            if not adapter_table.get(adapter_id).retired
        ]
        self._num_changes = adapter_table.num_changes
        return [
            AdapterMoved(adapter_id, name, tier)
            for adapter_id, name, tier in self._moves.of(changed, residency.names)
        ]
