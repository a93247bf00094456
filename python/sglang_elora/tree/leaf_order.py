"""The evictable leaves of a tree, kept in eviction order while the tree changes."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Node = TypeVar("Node")

_SLACK = 64
_FEW = 8
_REFRESHED = 8
"""Kinds per ``refresh``. Ranks fade with time, and with one at a time those of 200 kinds are too
old to find the lowest by: it cost a third of the hits (benchmarks/replay)."""

_MOST_RANKED = 16
"""Kinds per search, some 2 us each."""


def _one_kind(node: Any) -> Hashable:
    return None


class LeafOrder(set[Node]):
    """A set of leaves that yields the one of lowest priority without looking at the others.

    SGLang's tree core collects all leaves into a new heap at every eviction, so that freeing a
    thousand tokens takes time in proportion to everything cached. Here a heap per kind of node is
    kept between evictions, and a heap of kinds: ``add`` and ``take_lowest`` are O(log n) amortised,
    ``discard`` is the set's own, and a visit of a leaf costs nothing until that leaf reaches the
    top.

    That works for priorities that do not fall (time or number of visits): an entry of a heap is
    then at most too low, and is put right, or dropped if its node has left, when it comes up. A
    node that leaves and returns finds its entry still there, if its kind is what it was. Whoever
    lowers a member's priority, or changes its kind to one that ranks lower, calls ``lower``.

    It stays a ``set`` for all who only ask or compare. Members that were taken are out of the
    order until ``give_back``, so that one eviction meets no leaf twice; a taken leaf that is
    added again is in the order at once.

    The order depends on what was called when, and not on hashes, which differ between processes: so
    all ranks of a tensor-parallel group find the same one.

    Args:
        priority: Lowest goes first. Any ordered values; ties go first in, first out.
        kind: A node's kind; one for all by default.
        rank: Of a kind and a priority: what kinds are compared by. It rises with the priority, and
            may change with time: where kinds are few that is seen at once, else when ``refresh``
            comes round to them. When the ranks of many change together, a search looks at so many
            of them as it has time for and takes the lowest of these; later ones look on.
    """

    def __init__(
        self,
        priority: Callable[[Node], Any],
        kind: Callable[[Node], Hashable] = _one_kind,
        rank: Callable[[Any, Any], Any] = lambda kind, priority: priority,
    ) -> None:
        super().__init__()
        self._priority, self._kind, self._rank = priority, kind, rank
        self._heaps: dict[Hashable, list[tuple[Any, int, Node]]] = {}
        self._entry: dict[Node, tuple[int, Hashable]] = {}  # of each node: the valid one, and where
        self._taken: dict[Node, int] = {}  # with the numbers of their entries
        self._num_entries = 0  # numbered so far
        self._num_in_heaps = 0
        self._ranking: list[tuple[Any, int, Hashable]] = []  # of kinds, by their lowest
        self._ranked: dict[Hashable, int] = {}  # number of a kind's valid entry there
        self._stale: dict[Hashable, None] = {}  # kinds to be ranked anew, in an order of their own
        self._rotation: deque[Hashable] = deque()  # whose turn it is to be refreshed

    def add(self, node: Node) -> None:
        if node not in self:
            super().add(node)
            entry = self._entry.get(node)
            if entry is None or entry[1] != self._kind(node):
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
        node, number = self._pop(lowest[0])
        self._taken[node] = number
        return node

    def lowest_rank(self) -> Any:
        """Of the node that ``take_lowest`` would return; None if there is none."""
        lowest = self._lowest_kind()
        if lowest is None:
            return None
        top = self._top(lowest[0])
        assert top is not None
        return self._rank(lowest[0], top[0])

    def give_back(self) -> None:
        """Put what was taken and is still a member back in the order, where it was."""
        for node, number in self._taken.items():
            if node in self and node not in self._entry:
                self._push(node, number)
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
            if self._entry.get(entry[2]) == (entry[1], kind)
        ]
        if len(valid) != len(self._entry):
            raise RuntimeError(f"{len(valid)} entries for {len(self._entry)} nodes in the heaps")
        if sum(map(len, self._heaps.values())) != self._num_in_heaps:
            raise RuntimeError(f"{self._num_in_heaps} entries are not what the heaps hold")
        lost = self - self._entry.keys() - self._taken.keys()
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(self)} leaves are out of the order: {lost}")
        for kind, priority, _, node in valid:
            if node in self and kind == self._kind(node) and priority > self._priority(node):
                raise RuntimeError(f"priority of {node} fell from {priority}")

    def refresh(self) -> None:
        """Rank some kinds anew, in turns: ranks change with time."""
        for _ in range(min(_REFRESHED, len(self._rotation))):
            kind = self._rotation.popleft()
            if kind in self._heaps:
                self._rotation.append(kind)
                self._stale[kind] = None

    def _lowest_kind(self) -> tuple[Hashable] | None:
        """The kind whose top is the lowest of all (in a tuple, for None is a kind too)."""
        if len(self._heaps) == 1:
            (kind,) = self._heaps
            if self._top(kind) is not None and len(self._heaps) == 1:
                return (kind,)
        if len(self._heaps) <= _FEW:
            self._stale.update(dict.fromkeys(self._heaps))
        fresh: dict[Hashable, Any] = {}  # ranks found by this search
        left = _MOST_RANKED
        while True:
            while self._stale and left:
                kind = self._stale.popitem()[0]
                fresh.pop(kind, None)
                if (rank := self._rank_anew(kind)) is not None:
                    fresh[kind] = rank
                left -= 1
            if not left and self._stale:
                if fresh:
                    return (min(fresh, key=fresh.__getitem__),)
                left = _MOST_RANKED
                continue
            if not self._ranking:
                return None
            rank, number, kind = self._ranking[0]
            if self._ranked.get(kind) != number:  # replaced
                heapq.heappop(self._ranking)
                continue
            if kind in fresh:
                return (kind,)
            top = self._top(kind)
            if top is None or self._rank(kind, top[0]) != rank:
                self._stale[kind] = None
            if not self._stale:  # else other tops have changed by the search
                return (kind,)

    def _rank_anew(self, kind: Hashable) -> Any:
        """Its rank, or None if nothing is left of it."""
        top = self._top(kind) if kind in self._heaps else None
        if top is None:
            self._ranked.pop(kind, None)
            return None
        rank = self._rank(kind, top[0])
        self._num_entries += 1
        self._ranked[kind] = self._num_entries
        heapq.heappush(self._ranking, (rank, self._num_entries, kind))
        if len(self._ranking) > 2 * len(self._ranked) + _SLACK:
            self._ranking = [item for item in self._ranking if self._ranked.get(item[2]) == item[1]]
            heapq.heapify(self._ranking)
        return rank

    def _top(self, kind: Hashable) -> tuple[Any, int, Node] | None:
        """The lowest entry of a kind, with its node's present priority."""
        heap = self._heaps[kind]
        while heap:
            priority, entry, node = heap[0]
            if self._entry.get(node) != (entry, kind):  # replaced
                self._drop_top(heap)
            elif node not in self:
                del self._entry[node]
                self._drop_top(heap)
            elif self._kind(node) != kind:
                self._drop_top(heap)
                self._push(node)
            elif (current := self._priority(node)) != priority:  # visited since
                heapq.heapreplace(heap, (current, entry, node))
            else:
                return heap[0]
        del self._heaps[kind]
        return None

    def _pop(self, kind: Hashable) -> tuple[Node, int]:
        heap = self._heaps[kind]
        _, number, node = heap[0]
        self._stale[kind] = None
        del self._entry[node]
        self._drop_top(heap)
        return node, number

    def _drop_top(self, heap: list[tuple[Any, int, Node]]) -> None:
        heapq.heappop(heap)
        self._num_in_heaps -= 1

    def _push(self, node: Node, number: int | None = None) -> None:
        if self._num_in_heaps > 2 * len(self) + _SLACK:
            self._drop_invalid()
        self._num_in_heaps += 1
        if number is None:
            self._num_entries += 1
            number = self._num_entries
        kind = self._kind(node)
        heap = self._heaps.get(kind)
        if heap is None:
            heap = self._heaps[kind] = []
            self._rotation.append(kind)
        heapq.heappush(heap, (self._priority(node), number, node))
        self._entry[node] = (number, kind)
        if heap[0][1] == number:
            self._stale[kind] = None

    def _drop_invalid(self) -> None:
        """Entries of nodes that left, and those that were replaced."""
        for node in [node for node in self._entry if node not in self]:
            del self._entry[node]
        for kind, heap in self._heaps.items():
            heap[:] = [item for item in heap if self._entry.get(item[2]) == (item[1], kind)]
            heapq.heapify(heap)
        self._num_in_heaps = sum(map(len, self._heaps.values()))
