"""The evictable leaves of a tree, kept in eviction order while the tree changes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

Node = TypeVar("Node")

_SLACK = 64


class LeafOrder(set[Node]):
    """A set of leaves that yields the one of lowest priority without looking at the others.

    SGLang's tree core collects all leaves into a new heap at every eviction, so that freeing a
    thousand tokens takes time in proportion to everything cached. Here the heap is kept between
    evictions: ``add`` and ``take_lowest`` are O(log n) amortised, ``discard`` is the set's own,
    and a visit of a leaf costs nothing until that leaf reaches the top.

    That works for priorities that never fall (time or number of visits): an entry of the heap is
    then at most too low, and is put right, or dropped if its node has left, when it comes up. A
    node that leaves and returns finds its entry still there. The caller guarantees that
    priorities never fall.

    It stays a ``set`` for all who only ask or compare. Members that were taken are out of the
    order until ``give_back``, so that one eviction meets no leaf twice; a taken leaf that is
    added again is in the order at once.

    Args:
        priority: Lowest goes first. Any ordered values; ties go first in, first out.
    """

    def __init__(self, priority: Callable[[Node], Any]) -> None:
        super().__init__()
        self._priority = priority
        self._heap: list[tuple[Any, int, Node]] = []
        self._in_heap: set[Node] = set()
        self._taken: list[Node] = []
        self._num_entries = 0

    def add(self, node: Node) -> None:
        if node not in self:
            super().add(node)
            if node not in self._in_heap:
                self._push(node)

    def take_lowest(self) -> Node | None:
        """The waiting member of lowest priority, which stays a member; None if none waits."""
        while self._heap:
            priority, entry, node = self._heap[0]
            if node in self and (current := self._priority(node)) != priority:  # visited since
                heapq.heapreplace(self._heap, (current, entry, node))
                continue
            heapq.heappop(self._heap)
            self._in_heap.discard(node)
            if node in self:
                self._taken.append(node)
                return node
        return None

    def give_back(self) -> None:
        """Put what was taken and is still a member back in the order."""
        for node in self._taken:
            if node in self and node not in self._in_heap:
                self._push(node)
        self._taken.clear()

    def check_invariants(self) -> None:
        """Recompute everything from the members.

        Raises:
            RuntimeError: A member that is not taken has no entry, a node has two, or an entry is
                above its node's priority.
        """
        nodes = [node for _, _, node in self._heap]
        if len(nodes) != len(self._in_heap) or set(nodes) != self._in_heap:
            raise RuntimeError(f"{len(nodes)} entries for {len(self._in_heap)} nodes in the heap")
        lost = self - self._in_heap - set(self._taken)
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(self)} leaves are out of the order: {lost}")
        for priority, _, node in self._heap:
            if node in self and priority > self._priority(node):
                raise RuntimeError(f"priority of {node} fell from {priority}")

    def _push(self, node: Node) -> None:
        if len(self._heap) > 2 * len(self) + _SLACK:
            self._heap = [item for item in self._heap if item[2] in self]
            heapq.heapify(self._heap)
            self._in_heap = {item[2] for item in self._heap}
        self._num_entries += 1
        heapq.heappush(self._heap, (self._priority(node), self._num_entries, node))
        self._in_heap.add(node)
