"""Images in host memory that may be dropped, and which of them go for the next read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sglang_elora.tree import EvictionOrder

NUM_READERS = 2
"""Threads that read files. More of them take the interpreter from the scheduler."""


class IdleImages:
    """Adapters whose images nothing copies from, and which have a file to be read again from.

    Args:
        priority: Of an adapter. Infinity while a request waits for it.
        queue_position: Place in the queue of the first request that needs the image; infinity if
            none does.
    """

    def __init__(
        self, priority: Callable[[str], float], queue_position: Callable[[str], float]
    ) -> None:
        self.num_blocks = 0  # of the arena, that all of them hold
        self._order: EvictionOrder[str] = EvictionOrder(priority)
        self._blocks: dict[str, int] = {}  # 0: outside the arena
        self._priority, self._queue_position = priority, queue_position

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._blocks

    def add(self, adapter_id: str, num_blocks: int) -> None:
        assert adapter_id not in self._blocks, adapter_id
        self._blocks[adapter_id] = num_blocks
        self._order.add(adapter_id)
        self.num_blocks += num_blocks

    def discard(self, adapter_id: str) -> None:
        self.num_blocks -= self._blocks.pop(adapter_id, 0)
        self._order.discard(adapter_id)

    def lower(self, adapter_id: str) -> None:
        """Its priority fell."""
        self._order.lower(adapter_id)

    def victims(self, num_blocks: int, position: float) -> list[str] | None:
        """Adapters to drop so that so many blocks become free, for a request at this position.

        Those that no request waits for come first, lowest priority first; then those that only
        later requests need, or whose weights are on the device already, last request first.

        Returns:
            None if that is not enough, or if the position is infinity.
        """
        if position == math.inf or num_blocks > self.num_blocks:
            return None
        victims, needed_later = [], []
        while num_blocks > 0 and (adapter_id := self._order.take_lowest()) is not None:
            if not self._blocks[adapter_id]:
                continue
            if self._priority(adapter_id) < math.inf:
                victims.append(adapter_id)
                num_blocks -= self._blocks[adapter_id]
            elif self._queue_position(adapter_id) > position:
                needed_later.append(adapter_id)
        self._order.give_back()
        for adapter_id in sorted(needed_later, key=self._queue_position, reverse=True):
            if num_blocks > 0:
                victims.append(adapter_id)
                num_blocks -= self._blocks[adapter_id]
        return victims if num_blocks <= 0 else None

    def last_of(self, adapter_ids: Iterable[str], position: float) -> str | None:
        """Of these, the idle one that is needed last, if a request at this position may drop it."""
        idle = [adapter_id for adapter_id in adapter_ids if adapter_id in self._blocks]
        last = max(idle, key=self._queue_position, default=None)
        return None if last is None or self._queue_position(last) <= position else last

    def check_invariants(self, expected: dict[str, int]) -> None:
        """Raises:
        AssertionError: These are not the adapters and numbers of blocks that are expected.
        """
        assert self._blocks == expected, (self._blocks, expected)
        assert self._order == expected.keys(), (set(self._order), expected.keys())
        assert self.num_blocks == sum(expected.values()), self.num_blocks
        self._order.check_invariants()
