"""The evictable leaves of a tree, kept in eviction order while the tree changes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

from sglang_elora.tree.swept_heap import SweptHeap

Node = TypeVar("Node")
_Entry = tuple[Any, int, Node]
"""(priority, number, node)"""

_SLACK = 64
"""Outdated entries that are tolerated however few the members are."""

SWEPT_PER_PUSH = 4
"""Entries looked at per push while more than half of them are outdated. With 4, a round over all
entries ends before these have grown by a third; more of them make a push slower."""

SWEPT_PER_REFRESH = 16
"""Entries looked at per ``refresh``, some 10 us. Each gets its node's present priority, so that the
next search finds few outdated entries before the lowest member."""

_FEW = 8
_REFRESHED = 8
"""Kinds per ``refresh``. Ranks fade with time, and with one at a time those of 200 kinds are too
old to find the lowest by: it cost a third of the hits (benchmarks/replay)."""

_MOST_RANKED = 16
"""Kinds that are ranked again by the first search after ``give_back``, 2 to 30 us each."""

_RANKED_LATER = 4
"""The same by each later search, which knows what the first has found."""

_MOST_FRESH = 64
"""Ranks that later searches compare; then one ranks as many again as a first one does."""

MOST_OUTDATED = 32
"""Outdated entries that a first search removes, where it has a choice. Each takes up to 15 us,
because its node is in no cache of the processor."""

_OUTDATED_LATER = 8
"""The same for each later search."""


def _one_kind(node: Any) -> Hashable:
    return None


class EvictionOrder(set[Node]):
    """A set of leaves that yields the one of lowest priority without looking at the others.

    SGLang's tree core collects all leaves into a new heap at every eviction, so that freeing a
    thousand tokens takes time in proportion to everything cached. Here a heap per kind of node is
    kept between evictions, and a heap of kinds: ``add`` and ``take_lowest`` are O(log n) amortised,
    ``discard`` is the set's own, and a visit of a leaf costs nothing until that leaf reaches the
    top. ``add``, ``lower`` and ``refresh`` are O(log n) in the worst case too: outdated entries are
    swept out a few per call. ``take_lowest`` first removes the outdated entries that are lower than
    the lowest member, each of which was made by one earlier call. ``MOST_OUTDATED`` bounds how
    many, unless all kinds have more of them, or there is only one kind.

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
            of them as it has time for and takes the lowest of these; later ones look on. Until
            ``give_back``, a search knows what the ones before it have found.
    """

    def __init__(
        self,
        priority: Callable[[Node], Any],
        kind: Callable[[Node], Hashable] = _one_kind,
        rank: Callable[[Any, Any], Any] = lambda kind, priority: priority,
    ) -> None:
        super().__init__()
        self._priority, self._kind, self._rank = priority, kind, rank
        self._heaps: dict[Hashable, SweptHeap[_Entry[Node]]] = {}
        self._entry: dict[Node, tuple[int, Hashable]] = {}  # of each node: the valid one, and where
        self._taken: dict[Node, int] = {}  # with the numbers of their entries
        self._num_entries = 0  # numbered so far
        self._num_in_heaps = 0
        self._outdated_left = sys.maxsize  # that the search under way may remove
        self._fresh: dict[Hashable, Any] = {}  # ranks found since ``give_back``
        self._ranking: SweptHeap[tuple[Any, int, Hashable]] = SweptHeap()  # of kinds, by their top
        self._ranked: dict[Hashable, int] = {}  # number of a kind's valid entry there
        # Kinds to be ranked again, the last one first; those with many outdated entries come last.
        self._stale: OrderedDict[Hashable, None] = OrderedDict()
        # All kinds that have a heap, the next to be ranked again, and to be swept, first.
        self._rotation: OrderedDict[Hashable, None] = OrderedDict()
        self._unswept: OrderedDict[Hashable, None] = OrderedDict()

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
        self._fresh.clear()  # ``give_back`` does not follow this call
        lowest = self._lowest_kind()
        self._fresh.clear()
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
        self._fresh.clear()

    def check_invariants(self) -> None:
        """Recompute everything from the members.

        Raises:
            RuntimeError: A member that is not taken has no valid entry, a node has two, or an
                entry is above its node's priority.
            RuntimeError: A kind has a heap and no turn, or the other way round.
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
        if not (self._heaps.keys() == self._rotation.keys() == self._unswept.keys()):
            raise RuntimeError(f"{len(self._rotation)} turns of {len(self._heaps)} kinds")
        lost = self - self._entry.keys() - self._taken.keys()
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(self)} leaves are out of the order: {lost}")
        for kind, priority, _, node in valid:
            if node in self and kind == self._kind(node) and priority > self._priority(node):
                raise RuntimeError(f"priority of {node} fell from {priority}")

    def refresh(self) -> None:
        """Rank some kinds again, in turns, for ranks change with time, and sweep some entries."""
        for _ in range(min(_REFRESHED, len(self._rotation))):
            kind, _ = self._rotation.popitem(last=False)
            self._rotation[kind] = None
            self._stale[kind] = None
        self._sweep(SWEPT_PER_REFRESH)

    def _lowest_kind(self) -> tuple[Hashable] | None:
        """The kind whose top is the lowest of all (in a tuple, for None is a kind too)."""
        self._outdated_left = sys.maxsize
        if len(self._heaps) == 1:
            (kind,) = self._heaps
            if self._top(kind) is not None and len(self._heaps) == 1:
                return (kind,)
        if len(self._heaps) <= _FEW:
            self._stale.update(dict.fromkeys(self._heaps))
        if len(self._fresh) >= _MOST_FRESH:
            self._fresh.clear()
        knows_little = not self._fresh or len(self._heaps) <= _FEW
        most_ranked = _MOST_RANKED if knows_little else _RANKED_LATER
        most_outdated = MOST_OUTDATED if knows_little else _OUTDATED_LATER
        left, self._outdated_left = most_ranked, most_outdated
        while True:
            while self._stale and left and self._outdated_left > 0:
                kind = self._stale.popitem()[0]
                self._fresh.pop(kind, None)
                if (rank := self._rank_anew(kind)) is not None:
                    self._fresh[kind] = rank
                left -= 1
            if self._stale:
                if (lowest := self._lowest_fresh()) is not None:
                    return lowest
                left, self._outdated_left = most_ranked, most_outdated
                continue
            ranked = self._ranking.top()
            if ranked is None:
                return None
            rank, number, kind = ranked
            if self._ranked.get(kind) != number:  # replaced
                self._ranking.pop()
                continue
            top = self._top(kind)
            if top is None or self._rank(kind, top[0]) != rank:
                self._stale[kind] = None
            if not self._stale:  # else other tops have changed by the search
                return (kind,)

    def _lowest_fresh(self) -> tuple[Hashable] | None:
        """The lowest of the kinds ranked since ``give_back``; their tops may have left since."""
        while self._fresh:
            kind = min(self._fresh, key=self._fresh.__getitem__)
            top = None if kind in self._stale else self._top(kind)
            if top is None:
                self._fresh.pop(kind, None)
                if kind in self._heaps:
                    self._stale[kind] = None
            elif (rank := self._rank(kind, top[0])) == self._fresh[kind]:
                return (kind,)
            else:
                self._fresh[kind] = rank
        return None

    def _rank_anew(self, kind: Hashable) -> Any:
        """Its rank; None if nothing is left of it, or it has to be looked at again."""
        top = self._top(kind) if kind in self._heaps else None
        if top is None:
            if kind in self._heaps:
                self._stale[kind] = None
                self._stale.move_to_end(kind, last=False)
            return None
        rank = self._rank(kind, top[0])
        self._num_entries += 1
        self._ranked[kind] = self._num_entries
        self._ranking.push((rank, self._num_entries, kind))
        if len(self._ranking) > 2 * len(self._ranked) + _SLACK:
            self._ranking.sweep(
                SWEPT_PER_PUSH, lambda item: item if self._ranked.get(item[2]) == item[1] else None
            )
        return rank

    def _top(self, kind: Hashable) -> _Entry[Node] | None:
        """The lowest entry of a kind, with its node's present priority.

        None if there is none, and the kind is gone then; or if the search may remove no more.
        """
        heap = self._heaps[kind]
        while (top := heap.top()) is not None:
            priority, entry, node = top
            if self._entry.get(node) != (entry, kind):  # replaced
                self._drop_top(heap)
            elif node not in self:
                del self._entry[node]
                self._drop_top(heap)
            elif self._kind(node) != kind:
                self._drop_top(heap)
                self._push(node)
            elif (current := self._priority(node)) != priority:  # visited since
                heap.replace_top((current, entry, node))
            else:
                return top
            self._outdated_left -= 1
            if self._outdated_left <= 0 and len(heap):
                return None
        if self._heaps.get(kind) is heap:  # a push may have swept it away already
            self._drop_kind(kind)
        return None

    def _pop(self, kind: Hashable) -> tuple[Node, int]:
        heap = self._heaps[kind]
        top = heap.top()
        assert top is not None
        _, number, node = top
        self._stale[kind] = None
        del self._entry[node]
        self._drop_top(heap)
        return node, number

    def _drop_top(self, heap: SweptHeap[_Entry[Node]]) -> None:
        heap.pop()
        self._num_in_heaps -= 1

    def _drop_kind(self, kind: Hashable) -> None:
        """Forget a kind whose heap is empty."""
        del self._heaps[kind], self._rotation[kind], self._unswept[kind]
        self._ranked.pop(kind, None)
        self._fresh.pop(kind, None)

    def _push(self, node: Node, number: int | None = None) -> None:
        if self._has_many_outdated:
            self._sweep(SWEPT_PER_PUSH)
        self._num_in_heaps += 1
        if number is None:
            self._num_entries += 1
            number = self._num_entries
        kind = self._kind(node)
        heap = self._heaps.get(kind)
        if heap is None:
            heap = self._heaps[kind] = SweptHeap()
            self._rotation[kind] = self._unswept[kind] = None
        heap.push((self._priority(node), number, node))
        self._entry[node] = (number, kind)
        if (top := heap.top()) is not None and top[1] == number:
            self._stale[kind] = None

    @property
    def _has_many_outdated(self) -> bool:
        return self._num_in_heaps > 2 * len(self) + _SLACK

    def _sweep(self, most: int) -> None:
        """Look at so many entries, kind after kind, and remove those that are outdated."""
        while most > 0 and self._unswept:
            kind = next(iter(self._unswept))
            heap = self._heaps[kind]
            num_before = len(heap)
            most -= max(heap.sweep(most, partial(self._swept, kind)), 1)
            self._num_in_heaps += len(heap) - num_before
            if not len(heap):
                self._drop_kind(kind)
            elif heap.is_swept:
                self._unswept.move_to_end(kind)

    def _swept(self, kind: Hashable, entry: _Entry[Node]) -> _Entry[Node] | None:
        """The entry with its node's present priority; None if it is replaced.

        That of a node that left stays for its return, as long as there are few of them.
        """
        _, number, node = entry
        if self._entry.get(node) != (number, kind):
            return None
        if node in self:
            return (self._priority(node), number, node)
        if not self._has_many_outdated:
            return entry
        del self._entry[node]
        return None
