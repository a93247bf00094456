"""KV events that say whose KV it is, and events of adapters, for routers that follow them."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.kv_events import BlockStored
from sglang.srt.mem_cache.events import KVCacheEventRecorder

from sglang_elora.control.events import AdapterMoved, Moves
from sglang_elora.host.residency import Residency
from sglang_elora.host.state import tier_of
from sglang_elora.tree import adapter_of


def lora_number(uid: str) -> int:
    """An adapter's id as the events' ``lora_id``: its first 60 bits.

    Ids of ``--lora-paths`` are hashes of name and path: replicas started alike say the same.
    """
    return int(uid[:15], 16)


class AdapterEventRecorder(KVCacheEventRecorder):
    """SGLang's recorder, which leaves ``lora_id`` empty."""

    @classmethod
    def in_place_of(cls, recorder: KVCacheEventRecorder) -> AdapterEventRecorder:
        made = cls(enabled=recorder.enabled, page_size=recorder.page_size)
        made._queue = recorder._queue
        return made

    def record_store(self, node: Any, medium: Any = None, *, session_id: str | None = None) -> None:
        uid = adapter_of(node.key.extra_key)
        self._lora_id = None if uid is None else lora_number(uid)
        super().record_store(node, medium, session_id=session_id)

    def enqueue(self, event: Any) -> None:
        if isinstance(event, BlockStored):
            event.lora_id = self._lora_id
        super().enqueue(event)


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
            (uid, residency.name_of(uid), tier_of(residency, uid))
            for uid, _ in forest.changed_since(self._num_changes)
            if not forest.get(uid).retired
        ]
        self._num_changes = forest.num_changes
        return [
            AdapterMoved(lora_number(uid), name, tier)
            for uid, name, tier in self._moves.of(changed, residency.names)
        ]
