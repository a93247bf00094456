"""Counts the turns of conversations from the shape of the tree, without session names.

A finished request leaves KV below the KV that it found. So the turns of a conversation are the
finished requests whose KV lies on the path to its end: KV that a request adds has one turn more
than the KV above it. Where a request diverges from cached KV, the part that both share belongs to
the turn before (or, at the start of a prompt, to none, such as a system prompt).

An answer that is generated again for the same prompt counts as a further turn. A request with an
activated LoRA counts as none: the conversation goes on without its KV.

A conversation that was evicted and is computed again continues its count, if it is still known as
a ghost (``ghosts.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sglang_elora.policy.cache_entry import UNCOUNTED, CacheEntry


def end_turn(path: Sequence[CacheEntry]) -> None:
    """Count a finished request as a turn.

    Args:
        path: The request's KV, the deepest entry first, and its adapter if it has one.
    """
    kv = [item for item in path if not item.is_adapter]
    if not kv:
        return
    if kv[0].turns == UNCOUNTED:
        new = [item for item in kv if item.turns == UNCOUNTED]
        turns = max(turns_above(kv), *(item.turns_recalled for item in new))
        turns += not kv[0].is_activated
        for item in new:
            item.turns = item.turns_of_user = turns
    if kv[0].is_activated:
        return
    for item in kv:
        item.turns_of_user = kv[0].turns if item.turns > 0 else 0


def fork(item: CacheEntry, above: Iterable[CacheEntry]) -> None:
    """Count ``item`` as shared: requests diverge at its end, which is not the end of a turn.

    Args:
        above: The entries above it, the deepest first.
    """
    item.turns = turns_above(above)
    item.turns_of_user = min(item.turns_of_user, item.turns) if item.turns > 0 else 0


def turns_above(path: Iterable[CacheEntry]) -> int:
    """Turns of the deepest entry that has a count; 0 if none has."""
    counted = (item.turns for item in path if item.turns != UNCOUNTED and not item.is_adapter)
    return next(counted, 0)
