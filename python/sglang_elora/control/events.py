"""Events about the tier of each adapter, for routers, on the stream of SGLang's KV events.

A decoder of SGLang's three event types rejects a batch that contains another type: consumers must
add ``AdapterMoved`` to the union. A late subscriber gets the current state from
``GET /elora/state``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from sglang_elora.control.state import Tier

Unloaded = Literal["unloaded"]


class AdapterMoved(msgspec.Struct, frozen=True, tag=True):
    """Event: an adapter's weights are in this tier now. SGLang's events for its KV have the same
    ``lora_name``."""

    lora_id: str
    lora_name: str
    tier: Tier | Unloaded


class Moves:
    """Detects adapters whose tier has changed since it was last reported."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, Tier]] = {}  # reported name and tier, by id

    def of(
        self, changed: Iterable[tuple[str, str, Tier]], loaded: Mapping[str, str]
    ) -> list[tuple[str, str, Tier | Unloaded]]:
        """(id, name, tier) of each adapter that moved; O(``changed``), O(all) after an unload.

        Args:
            changed: (id, name, tier) of the adapters that changed in any way since the last call.
            loaded: Names of all loaded adapters, by id.
        """
        moved: list[tuple[str, str, Tier | Unloaded]] = []
        for adapter_id, name, tier in changed:
            if self._told.get(adapter_id) != (name, tier):
                self._told[adapter_id] = (name, tier)
                moved.append((adapter_id, name, tier))
        if len(self._told) == len(loaded):
            return moved
        gone = [adapter_id for adapter_id in self._told if adapter_id not in loaded]
        return [
            *((adapter_id, self._told.pop(adapter_id)[0], "unloaded") for adapter_id in gone),
            *moved,
        ]
