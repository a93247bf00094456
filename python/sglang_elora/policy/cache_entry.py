"""What a policy knows of one node of the cache tree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

NEVER = float("-inf")


class SessionState(IntEnum):
    """What those who use an item have said of themselves."""

    UNKNOWN = 0
    ALIVE = 1  # a session that is not over has used it last
    OVER = 2  # the one session that used it is over
    BEGINNING = 3  # so it is, and others may begin in the same way, with the same system prompt


@dataclass(slots=True, eq=False)
class CacheEntry:
    """An adapter, or a run of KV tokens.

    ``visits`` and what follows is set by the policy that owns the item, the rest by the tree. A
    slot holds one token's KV, or as many bytes of an adapter.
    """

    is_adapter: bool
    num_slots: int
    group: str | None = None  # the adapter it is, or belongs to; None is the base model
    backed: bool = False  # a copy of it is on the host: an adapter's always is
    queue_position: int | None = None  # of the first queued request that needs it
    prefetched: bool = False  # brought to the device for nobody, and not used since
    session_state: SessionState = SessionState.UNKNOWN  # set by the policy when it is told
    visits: int = 0  # requests that used it, the one that made it included
    last: float = NEVER  # of its last visit
    score: float = NEVER
    counted: tuple[int, int, int] | None = None  # as what it is counted in its group

    def split(self, num_slots: int) -> CacheEntry:
        """The first ``num_slots`` of this run as an item of their own; they share a past."""
        assert not self.is_adapter and 0 < num_slots < self.num_slots, (self, num_slots)
        first = replace(self, num_slots=num_slots, queue_position=None, prefetched=False)
        self.num_slots -= num_slots
        return first
