"""Events of adapters on the stream of SGLang's KV events, for routers that follow them."""

from __future__ import annotations

from sglang_elora.control.events import AdapterMoved, Moves
from sglang_elora.srt.mem_cache.residency import Residency


class AdapterMoves:
    """Where adapters have gone since the last batch of events."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._moves = Moves()
        self._num_changes = 0  # of the forest, that were looked at

    def take(self) -> list[AdapterMoved]:
        residency = self._residency
        forest = residency.forest
        if forest.num_changes == self._num_changes:
            return []
        changed = [
            (uid, residency.name_of(uid), residency.tier_of(uid))
            for uid, _ in forest.changed_since(self._num_changes)
            if not forest.get(uid).retired
        ]
        self._num_changes = forest.num_changes
        return [
            AdapterMoved(uid, name, tier)
            for uid, name, tier in self._moves.of(changed, residency.names)
        ]
