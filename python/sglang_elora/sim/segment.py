"""Nodes of the simulator's tree."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from sglang_elora.policy import CacheEntry
from sglang_elora.tree import NOBODY, Adapter


@dataclass(slots=True, eq=False)
class Segment:
    """An adapter, or KV that is cached and evicted as a whole: a system prompt, or a turn with its
    answer. Only the cache changes its state.
    """

    entry: CacheEntry
    adapter: Adapter  # itself, or the one whose KV it is; the base model if KV needs no adapter
    parent: Segment | None = None  # None for adapters and for the base model
    on_device: bool = False
    on_host: bool = False  # KV only; ``Images`` tracks adapters
    locks: int = 0
    device_children: int = 0
    children: dict[Segment, None] = field(default_factory=dict)  # on any tier
    sessions: Set[str] = NOBODY
    num_sessions: int = 0

    @property
    def num_slots(self) -> int:
        return self.entry.num_slots

    @property
    def is_base(self) -> bool:
        """Whether it is the base model, which has no slots and is never evicted."""
        return self.entry.is_adapter and self.entry.group is None

    @property
    def is_locked(self) -> bool:
        return self.locks > 0

    @property
    def is_cached(self) -> bool:
        return self.on_device or self.on_host
