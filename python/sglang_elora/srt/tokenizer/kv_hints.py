"""Prefetch hints for adapters, in SGLang's envelope for hints on a request (``kv_hints``).

    "kv_hints": {"protocol_version": "1", "message_id": "...", "actions": [
        {"action_id": "...", "action_type": "elora.prefetch", "action_version": "1",
         "payload": {"lora_name": ["sql", "law"]}}]}

They are announced like the request's own adapter. Actions of other types are ignored here.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

PREFETCH = "elora.prefetch"
VERSION = "1"


class Prefetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Payload of the action: the served names of adapters."""

    lora_name: str | list[str]


def adapters_named(
    hints: KvHintsEnvelope | Iterable[KvHintsEnvelope | None] | None,
) -> list[str]:
    """Adapter names in the hints of one request or of a batch. Their existence is not checked.

    Raises:
        ValueError: A prefetch action has another version or an invalid payload.
    """
    envelopes = [hints] if isinstance(hints, KvHintsEnvelope) else hints or ()
    # Requests of a batch may share an envelope.
    once = {id(envelope): envelope for envelope in envelopes if envelope is not None}
    return [
        name
        for envelope in once.values()
        for action in envelope.actions
        if action.action_type == PREFETCH
        for name in _adapters(action)
    ]


def _adapters(action: KvHintAction) -> list[str]:
    if action.action_version != VERSION:
        raise ValueError(
            f"kv_hints action {action.action_id!r}: {PREFETCH} has version {VERSION!r} here, not "
            f"{action.action_version!r}"
        )
    try:
        payload = msgspec.convert(action.payload, Prefetch)
    except msgspec.ValidationError as error:
        raise ValueError(f"kv_hints action {action.action_id!r} ({PREFETCH}): {error}") from None
    return [payload.lora_name] if isinstance(payload.lora_name, str) else payload.lora_name
