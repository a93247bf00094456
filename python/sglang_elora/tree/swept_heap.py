"""A binary heap whose outdated items are removed a few per call."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

CacheEntry = TypeVar("CacheEntry", bound=tuple[Any, ...])


class SweptHeap(Generic[CacheEntry]):
    """A heap of tuples from which outdated items are removed without a pass over all of them.

    The items lie in two heaps; the top is the lower of their two tops. ``sweep`` takes items from
    the end of one heap, which leaves it a valid heap, and pushes those to keep to the other; new
    items are pushed to the other as well. A round of sweeps ends when the first heap is empty; the
    next round begins by exchanging the two. So a sweep costs O(log n) per item, and no call costs
    O(n).
    """

    __slots__ = ("_swept", "_unswept")

    def __init__(self) -> None:
        self._unswept: list[CacheEntry] = []  # not yet checked in this round
        self._swept: list[CacheEntry] = []

    def __len__(self) -> int:
        return len(self._unswept) + len(self._swept)

    def __iter__(self) -> Iterator[CacheEntry]:
        yield from self._unswept
        yield from self._swept

    def push(self, item: CacheEntry) -> None:
        heapq.heappush(self._swept, item)

    def top(self) -> CacheEntry | None:
        """The lowest item; None if there is none."""
        heap = self._lower()
        return heap[0] if heap else None

    def pop(self) -> None:
        """Remove the top."""
        heapq.heappop(self._lower())

    def replace_top(self, item: CacheEntry) -> None:
        """Remove the top and push ``item``."""
        heapq.heapreplace(self._lower(), item)

    def sweep(self, most: int, keep: Callable[[CacheEntry], CacheEntry | None]) -> int:
        """Check up to ``most`` items, not beyond the end of the round.

        Args:
            keep: Returns the item to keep in place of a given one, or None to remove it.

        Returns:
            How many items were checked.
        """
        if not self._unswept:
            self._unswept, self._swept = self._swept, self._unswept
        num_looks = min(most, len(self._unswept))
        for _ in range(num_looks):
            kept = keep(self._unswept.pop())
            if kept is not None:
                heapq.heappush(self._swept, kept)
        return num_looks

    @property
    def is_swept(self) -> bool:
        """Whether a round has just ended, or there is nothing to sweep."""
        return not self._unswept

    def _lower(self) -> list[CacheEntry]:
        if not self._unswept:
            return self._swept
        if not self._swept or self._unswept[0] < self._swept[0]:
            return self._unswept
        return self._swept
