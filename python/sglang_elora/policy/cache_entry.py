"""The state of one cache entry (a node of the cache tree) that eviction policies read and keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

NEVER = float("-inf")

UNCOUNTED = -1
"""``CacheEntry.turns`` of KV that no finished request has used yet."""


class SessionState(IntEnum):
    """State of the sessions that use a cache entry, as far as requests name sessions."""

    UNKNOWN = 0
    ALIVE = 1  # the last turn of an open session used it
    OVER = 2  # the only session that used it is closed
    BEGINNING = 3  # as OVER, but at the start of a prompt: other sessions may share it


@dataclass(slots=True, eq=False)
class CacheEntry:
    """An adapter, or the KV of a run of consecutive tokens.

    The policy that owns the entry sets ``visits`` and the fields below it; the tree sets the rest.
    A slot holds one token's KV, or the same number of bytes of an adapter.
    """

    is_adapter: bool
    num_slots: int
    group: str | None = None  # id of the adapter that it is or belongs to; None: base model
    is_activated: bool = False  # KV of an activated LoRA, below KV of the base model
    backed: bool = False  # it has a copy on the host; always true for an adapter
    queue_position: int | None = None  # position of the first queued request that needs it
    prefetched: bool = False  # loaded without a request that needs it, and not used since
    session_state: SessionState = SessionState.UNKNOWN  # set by ``Policy.set_session_state``
    turns: int = UNCOUNTED  # conversation turns in the prompt up to its end (``tree/turns.py``)
    turns_recalled: int = 0  # of ghosts whose tokens it contains (``tree/ghosts.py``)
    turns_of_user: int = 0  # turns so far of the conversation that used it last; 0: shared KV
    visits: int = 0  # requests that used it, including the one that created it
    last: float = NEVER  # policy clock (turnovers) at its last visit
    score: float = NEVER
    counted: tuple[int, int, int] | None = None  # key under which its group counts its slots

    def split(self, num_slots: int) -> CacheEntry:
        """Split off the first ``num_slots`` as a new entry with the same history; returns it."""
        assert not self.is_adapter and 0 < num_slots < self.num_slots, (self, num_slots)
        first = replace(self, num_slots=num_slots, queue_position=None, prefetched=False)
        self.num_slots -= num_slots
        return first
