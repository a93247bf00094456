"""The evictable leaves of a tree, kept in eviction order while the tree changes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Node = TypeVar("Node")

_SLACK = 64


def _one_kind(node: Any) -> Hashable:
    return None


class LeafOrder(set[Node]):
    """A set of leaves that yields the one of lowest priority without looking at the others.

    SGLang's tree core collects all leaves into a new heap at every eviction, so that freeing a
    thousand tokens takes time in proportion to everything cached. Here a heap per kind of node is
    kept between evictions: ``add`` and ``take_lowest`` are O(kinds + log n) amortised, ``discard``
    is the set's own, and a visit of a leaf costs nothing until that leaf reaches the top.

    That works for priorities that do not fall (time or number of visits): an entry of a heap is
    then at most too low, and is put right, or dropped if its node has left, when it comes up. A
    node that leaves and returns finds its entry still there. Whoever lowers a priority, or moves a
    node to a kind in which it ranks lower, calls ``lower``.

    It stays a ``set`` for all who only ask or compare. Members that were taken are out of the
    order until ``give_back``, so that one eviction meets no leaf twice; a taken leaf that is
    added again is in the order at once.

    Args:
        priority: Lowest goes first. Any ordered values; ties go first in, first out.
        kind: A node's kind; one for all by default.
        bias: Of a kind: added to its nodes' priorities, which are numbers then, when kinds are
            compared. It may change at any time.
    """

    def __init__(
        self,
        priority: Callable[[Node], Any],
        kind: Callable[[Node], Hashable] = _one_kind,
        bias: Callable[[Any], float] | None = None,
    ) -> None:
        super().__init__()
        self._priority, self._kind, self._bias = priority, kind, bias
        self._heaps: dict[Hashable, list[tuple[Any, int, Node]]] = {}
        self._entry: dict[Node, int] = {}  # number of a node's valid entry
        self._taken: list[Node] = []
        self._num_entries = 0  # numbered so far
        self._num_in_heaps = 0
        self._has_moved = False  # a node changed heaps during a search

    def add(self, node: Node) -> None:
        if node not in self:
            super().add(node)
            if node not in self._entry:
                self._push(node)

    def lower(self, node: Node) -> None:
        """The node's priority fell, or its kind changed to one of lower bias."""
        if node in self._entry:
            self._push(node)  # what it replaces is dropped when it comes up

    def take_lowest(self) -> Node | None:
        """The waiting member of lowest priority, which stays a member; None if none waits."""
        lowest = self._lowest_kind()
        if lowest is None:
            return None
        node = self._pop(lowest[0])
        self._taken.append(node)
        return node

    def give_back(self) -> None:
        """Put what was taken and is still a member back in the order."""
        for node in self._taken:
            if node in self and node not in self._entry:
                self._push(node)
        self._taken.clear()

    def check_invariants(self) -> None:
        """Recompute everything from the members.

        Raises:
            RuntimeError: A member that is not taken has no valid entry, a node has two, or an
                entry is above its node's priority.
        """
        valid = [
            (kind, *entry)
            for kind, heap in self._heaps.items()
            for entry in heap
            if self._entry.get(entry[2]) == entry[1]
        ]
        if len(valid) != len(self._entry):
            raise RuntimeError(f"{len(valid)} entries for {len(self._entry)} nodes in the heaps")
        if sum(map(len, self._heaps.values())) != self._num_in_heaps:
            raise RuntimeError(f"{self._num_in_heaps} entries are not what the heaps hold")
        lost = self - self._entry.keys() - set(self._taken)
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(self)} leaves are out of the order: {lost}")
        for kind, priority, _, node in valid:
            if node in self and kind == self._kind(node) and priority > self._priority(node):
                raise RuntimeError(f"priority of {node} fell from {priority}")

    def _lowest_kind(self) -> tuple[Hashable] | None:
        """The kind whose top is the lowest of all (in a tuple, for None is a kind too)."""
        while True:
            self._has_moved = False
            ranks = []
            for kind in list(self._heaps):
                top = self._top(kind)
                if top is not None:
                    rank = top[0] if self._bias is None else top[0] + self._bias(kind)
                    ranks.append((rank, top[1], kind))
            if not self._has_moved:  # else a node has come to a heap that was looked at
                return min(ranks)[2:] if ranks else None

    def _top(self, kind: Hashable) -> tuple[Any, int, Node] | None:
        """The lowest entry of a kind, with its node's present priority."""
        heap = self._heaps[kind]
        while heap:
            priority, entry, node = heap[0]
            if self._entry.get(node) != entry:  # replaced
                self._drop_top(heap)
            elif node not in self:
                del self._entry[node]
                self._drop_top(heap)
            elif self._kind(node) != kind:
                self._drop_top(heap)
                self._push(node)
                self._has_moved = True
            elif (current := self._priority(node)) != priority:  # visited since
                heapq.heapreplace(heap, (current, entry, node))
            else:
                return heap[0]
        del self._heaps[kind]
        return None

    def _pop(self, kind: Hashable) -> Node:
        heap = self._heaps[kind]
        node = heap[0][2]
        del self._entry[node]
        self._drop_top(heap)
        return node

    def _drop_top(self, heap: list[tuple[Any, int, Node]]) -> None:
        heapq.heappop(heap)
        self._num_in_heaps -= 1

    def _push(self, node: Node) -> None:
        if self._num_in_heaps > 2 * len(self) + _SLACK:
            self._drop_invalid()
        self._num_entries += 1
        self._num_in_heaps += 1
        entry = (self._priority(node), self._num_entries, node)
        heapq.heappush(self._heaps.setdefault(self._kind(node), []), entry)
        self._entry[node] = self._num_entries

    def _drop_invalid(self) -> None:
        """Entries of nodes that left, and those that were replaced."""
        for node in [node for node in self._entry if node not in self]:
            del self._entry[node]
        for heap in self._heaps.values():
            heap[:] = [item for item in heap if self._entry.get(item[2]) == item[1]]
            heapq.heapify(heap)
        self._num_in_heaps = sum(map(len, self._heaps.values()))
