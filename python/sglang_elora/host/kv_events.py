"""KV events that say whose KV it is, for routers that follow them."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.kv_events import BlockStored
from sglang.srt.mem_cache.events import KVCacheEventRecorder

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
