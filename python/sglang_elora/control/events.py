"""Where adapters are, as events for routers, on the stream of SGLang's KV events.

A decoder of SGLang's three types refuses a batch with another in it: consumers decode with
``AdapterMoved`` in the union. ``GET /elora/state`` tells whoever comes later what went before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from sglang_elora.control.state import Tier

Unloaded = Literal["unloaded"]


class AdapterMoved(msgspec.Struct, frozen=True, tag=True):
    """An adapter's weights are in this tier now. SGLang's events of its KV say ``lora_name``."""

    lora_id: str
    lora_name: str
    tier: Tier | Unloaded


class Moves:
    """Which adapters are elsewhere than was told last."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, Tier]] = {}  # name and tier, by id

    def of(
        self, changed: Iterable[tuple[str, str, Tier]], loaded: Mapping[str, str]
    ) -> list[tuple[str, str, Tier | Unloaded]]:
        """(id, name, tier) of each that moved; O(``changed``), and O(all) when one was unloaded.

        Args:
            changed: (id, name, tier) of all in which anything has changed since the last call.
            loaded: Names of all that are loaded, by id.
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
