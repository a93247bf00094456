"""The evictable leaves of a tree, kept in eviction order while the tree changes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

Node = TypeVar("Node")

_SLACK = 64


class LeafOrder(set[Node]):
    """A set of leaves that yields the one of lowest priority without looking at the others.

    SGLang collects all leaves into a new heap at every eviction, so that freeing a thousand
    tokens takes time in proportion to everything cached. Here the heap is kept between
    evictions: ``add`` and ``take_lowest`` are O(log n) amortised, ``discard`` O(1), and a visit
    of a leaf costs nothing until that leaf reaches the top.

    That works for priorities that never fall while a node is a member (time or number of
    visits): an entry of the heap is then at most too low, and is put right when it comes up. The
    caller guarantees it.

    It stays a ``set`` for all who only ask or compare. Members that were taken are out of the
    order until ``give_back``, so that one eviction meets no leaf twice; a taken leaf that is
    discarded and added again is in the order at once.

    Args:
        priority: Lowest goes first. Any ordered values; ties go first in, first out.
    """

    def __init__(self, priority: Callable[[Node], Any]) -> None:
        super().__init__()
        self._priority = priority
        self._heap: list[tuple[Any, int, Node]] = []
        self._entry: dict[object, int] = {}  # number of each waiting member's one valid entry
        self._taken: list[Node] = []
        self._next_entry = 0

    def add(self, node: Node) -> None:
        if node not in self:
            super().add(node)
            self._push(node)

    def discard(self, element: object) -> None:
        super().discard(element)
        self._entry.pop(element, None)

    def take_lowest(self) -> Node | None:
        """The waiting member of lowest priority, which stays a member; None if none waits."""
        while self._heap:
            priority, entry, node = self._heap[0]
            if self._entry.get(node) != entry:
                heapq.heappop(self._heap)  # discarded since, or added again
                continue
            current = self._priority(node)
            if current != priority:  # visited since
                heapq.heapreplace(self._heap, (current, entry, node))
                continue
            heapq.heappop(self._heap)
            del self._entry[node]
            self._taken.append(node)
            return node
        return None

    def give_back(self) -> None:
        """Put what was taken and is still a member back in the order."""
        for node in self._taken:
            if node in self and node not in self._entry:
                self._push(node)
        self._taken.clear()

    def check_invariants(self) -> None:
        """Recompute everything from the members.

        Raises:
            RuntimeError: A member that is not taken has no valid entry, a non-member has one,
                or an entry is above its node's priority.
        """
        valid = {node: p for p, entry, node in self._heap if self._entry.get(node) == entry}
        waiting = (set(self) - set(self._taken)) | self._entry.keys()
        if valid.keys() != waiting or not waiting <= set(self):
            raise RuntimeError(
                f"leaf order holds {len(valid)} entries for {len(waiting)} waiting of "
                f"{len(self)} members"
            )
        for node, priority in valid.items():
            if priority > self._priority(node):
                raise RuntimeError(f"priority of {node} fell from {priority}")

    def _push(self, node: Node) -> None:
        if len(self._heap) > 2 * len(self) + _SLACK:
            self._drop_invalid()
        self._next_entry += 1
        self._entry[node] = self._next_entry
        heapq.heappush(self._heap, (self._priority(node), self._next_entry, node))

    def _drop_invalid(self) -> None:
        self._heap = [item for item in self._heap if self._entry.get(item[2]) == item[1]]
        heapq.heapify(self._heap)
