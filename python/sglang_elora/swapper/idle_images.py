"""Idle images in host memory, and the choice of victims among them for the next read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sglang_elora.tree import EvictionOrder

NUM_READERS = 2
"""Threads that read files. More of them compete with the scheduler for the interpreter lock."""


class IdleImages:
    """Adapters whose images may be dropped: no copy reads them, and each has a file.

    Args:
        priority: Of an adapter. Infinity while a queued request needs it.
        queue_position: Position of the first queued request that needs the image; infinity if none
            does.
    """

    def __init__(
        self, priority: Callable[[str], float], queue_position: Callable[[str], float]
    ) -> None:
        self.num_blocks = 0  # blocks of the arena that all of them hold
        self._order: EvictionOrder[str] = EvictionOrder(priority)
        self._blocks: dict[str, int] = {}  # adapter -> its blocks; 0: outside the arena
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
        """Record that the adapter's priority fell."""
        self._order.lower(adapter_id)

    def victims(self, num_blocks: int, position: float) -> list[str] | None:
        """Adapters to drop to free ``num_blocks`` blocks for a request at this queue position.

        Images that no queued request needs come first, lowest priority first; then images that only
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
        """The idle one of these adapters that is needed last; None if there is none, or if a
        request at ``position`` may not drop it."""
        idle = [adapter_id for adapter_id in adapter_ids if adapter_id in self._blocks]
        last = max(idle, key=self._queue_position, default=None)
        return None if last is None or self._queue_position(last) <= position else last

    def check_invariants(self, expected: dict[str, int]) -> None:
        """Raises:
        AssertionError: The adapters or their numbers of blocks are not the expected ones.
        """
        assert self._blocks == expected, (self._blocks, expected)
        assert self._order == expected.keys(), (set(self._order), expected.keys())
        assert self.num_blocks == sum(expected.values()), self.num_blocks
        self._order.check_invariants()
