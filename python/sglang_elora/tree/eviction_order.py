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
"""Outdated entries that are always tolerated. More of them save sweeps and cost memory."""

SWEPT_PER_PUSH = 4
"""Entries checked per push while more than half of them are outdated. With 4, a round over all
entries ends before their number has grown by a third. More make a push slower."""

SWEPT_PER_REFRESH = 16
"""Entries checked per ``refresh``, about 10 us. Each gets its node's current priority, so that the
next search meets few outdated entries. More make a refresh slower."""

_FEW = 8
"""Up to this many kinds, each search ranks all of them again."""

_REFRESHED = 8
"""Kinds ranked again per ``refresh``. Ranks change with time: with one kind per refresh, the ranks
of 200 kinds were too old, which cost a third of the hits (benchmarks/replay)."""

_MOST_RANKED = 16
"""Most kinds that the first search after ``give_back`` ranks again, 2 to 30 us each. More find a
lower victim, in a slower search."""

_RANKED_LATER = 4
"""As ``_MOST_RANKED``, for later searches, which reuse the ranks that earlier ones computed."""

_MOST_FRESH = 64
"""Most ranks that later searches reuse. Beyond it, the next search counts as a first one."""

MOST_OUTDATED = 32
"""Outdated entries that a first search removes before it takes the best kind found so far. Each
takes up to 15 us, because its node is not in a CPU cache."""

_OUTDATED_LATER = 8
"""As ``MOST_OUTDATED``, for later searches."""


def _one_kind(node: Any) -> Hashable:
    return None


class EvictionOrder(set[Node]):
    """A set of leaves that finds its lowest member without a pass over all members.

    SGLang's tree core collects all leaves into a new heap at every eviction, so freeing a thousand
    tokens takes time in proportion to everything cached. Here one heap per kind of node, and a heap
    of kinds, are kept between evictions. ``add`` and ``take_lowest`` are O(log n) amortised,
    ``discard`` is that of ``set``, and a visit of a leaf costs nothing until the leaf reaches the
    top. ``add``, ``lower`` and ``refresh`` are O(log n) in the worst case, too: outdated entries
    are swept out a few per call. ``take_lowest`` first removes the outdated entries that are lower
    than the lowest member, each of which was created by one earlier call. ``MOST_OUTDATED`` bounds
    their number, unless all kinds have more of them or there is only one kind.

    This requires that priorities do not fall (such as time or number of visits). A heap entry is
    then at most too low; it is corrected when it reaches the top, or dropped if its node is no
    longer a member. A node that is removed and added again reuses its entry if its kind is the
    same. Code that lowers a member's priority, or changes its kind to one of lower rank, must call
    ``lower``.

    It is a ``set``, for SGLang's code that only tests membership or compares. Taken members are out
    of the order until ``give_back``, so that one eviction meets no leaf twice; a taken leaf that is
    added again is in the order at once.

    The order depends only on the sequence of calls, not on hashes, which differ between processes.
    So all ranks of a tensor-parallel group find the same victim.

    Args:
        priority: Of a node; the lowest is evicted first. Any ordered values; ties are first in,
            first out.
        kind: Of a node; by default all nodes are of one kind.
        rank: Maps (kind, priority) to the value by which kinds are compared. It rises with the
            priority and may change with time. With few kinds a change takes effect at once,
            otherwise at a later ``refresh``. If the ranks of many kinds change together, a search
            ranks a bounded number of them and takes the lowest; later searches continue. Until
            ``give_back``, a search reuses the ranks that earlier ones computed.
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
        self._entry: dict[Node, tuple[int, Hashable]] = {}  # (number, kind) of its valid entry
        self._taken: dict[Node, int] = {}  # taken members -> number of their entry
        self._num_entries = 0  # numbered so far
        self._num_in_heaps = 0
        self._outdated_left = sys.maxsize  # outdated entries that this search may still remove
        self._fresh: dict[Hashable, Any] = {}  # ranks computed since ``give_back``
        self._ranking: SweptHeap[tuple[Any, int, Hashable]] = SweptHeap()  # (rank, number, kind)
        self._ranked: dict[Hashable, int] = {}  # kind -> number of its valid entry in ``_ranking``
        # Kinds to rank again, taken from the end; kinds with many outdated entries are at the
        # start.
        self._stale: OrderedDict[Hashable, None] = OrderedDict()
        # All kinds that have a heap: the next one to rank again, or to sweep, is first.
        self._rotation: OrderedDict[Hashable, None] = OrderedDict()
        self._unswept: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, node: Node) -> None:
        if node not in self:
            super().add(node)
            entry = self._entry.get(node)
            if entry is None or entry[1] != self._kind(node):
                self._push(node)

    def lower(self, node: Node) -> None:
        """Record that the node's priority fell, or that its kind changed to one of lower rank."""
        if node in self._entry:
            self._push(node)  # the old entry is dropped when it reaches the top

    def take_lowest(self) -> Node | None:
        """Take the lowest member out of the order and return it; None if there is none.

        It stays a member of the set.
        """
        lowest = self._lowest_kind()
        if lowest is None:
            return None
        node, number = self._pop(lowest[0])
        self._taken[node] = number
        return node

    def lowest_rank(self) -> Any:
        """Rank of the node that ``take_lowest`` would return; None if there is none."""
        self._fresh.clear()  # ``give_back`` does not follow this call
        lowest = self._lowest_kind()
        self._fresh.clear()
        if lowest is None:
            return None
        top = self._top(lowest[0])
        assert top is not None
        return self._rank(lowest[0], top[0])

    def give_back(self) -> None:
        """Return taken nodes that are still members to their places in the order."""
        for node, number in self._taken.items():
            if node in self and node not in self._entry:
                self._push(node, number)
        self._taken.clear()
        self._fresh.clear()

    def check_invariants(self) -> None:
        """Check the heaps and indices against the members.

        Raises:
            RuntimeError: A member that is not taken has no valid entry, a node has two, an entry
                is above its node's priority, or the indices of kinds do not match the heaps.
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
        """Rank the next few kinds again, since ranks change with time, and sweep some entries."""
        for _ in range(min(_REFRESHED, len(self._rotation))):
            kind, _ = self._rotation.popitem(last=False)
            self._rotation[kind] = None
            self._stale[kind] = None
        self._sweep(SWEPT_PER_REFRESH)

    def _lowest_kind(self) -> tuple[Hashable] | None:
        """The kind of lowest rank, in a tuple because None is a valid kind; None if empty."""
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
            if not self._stale:  # otherwise the search has changed the tops of other kinds
                return (kind,)

    def _lowest_fresh(self) -> tuple[Hashable] | None:
        """The lowest kind of those ranked since ``give_back``, whose tops are checked again."""
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
        """Rank a kind again and return its rank; None if it is empty or not fully searched yet."""
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
        """The lowest valid entry of a kind, with its node's current priority.

        None if there is none (the kind is then removed), or if the search may remove no more
        outdated entries.
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
            elif (current := self._priority(node)) != priority:  # visited since it was pushed
                heap.replace_top((current, entry, node))
            else:
                return top
            self._outdated_left -= 1
            if self._outdated_left <= 0 and len(heap):
                return None
        if self._heaps.get(kind) is heap:  # otherwise a sweep of ``_push`` has removed it
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
        """Remove a kind whose heap is empty."""
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
        """Check up to ``most`` entries, kind by kind, and remove outdated ones."""
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
        """The entry with its node's current priority; None to remove it.

        The entry of a node that is no longer a member is kept, in case it is added again, as long
        as there are few of them.
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
