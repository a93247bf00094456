"""KV that left device and host, remembered for a while without its content.

Otherwise a cache learns nothing beyond the age at which it drops KV: the drop ends the observation.
A ghost is the entry of dropped KV. If its tokens are computed again in time, that counts as a late
reuse, and the conversation keeps its number of turns; if not, the entry was not reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from sglang_elora.policy import CacheEntry, Policy, SessionState

MOST_GHOSTS = 16_384
"""Most ghosts; the oldest is forgotten beyond it. More remember tiny KV longer, 0.3 KB each."""

_Key = tuple[Hashable, Hashable]


class Ghosts:
    """The ghosts of one tree, by namespace and key. Each call is O(1) amortised per key.

    Args:
        policy: Its ``ghost_turnovers`` say how long a ghost is kept. With 0 there are none.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._keys: dict[Hashable, dict[Hashable, CacheEntry]] = {}
        self._dropped_at: OrderedDict[_Key, float] = OrderedDict()  # policy clock, oldest first

    def __len__(self) -> int:
        return len(self._dropped_at)

    def has(self, namespace: Hashable) -> bool:
        return namespace in self._keys

    def add(self, namespace: Hashable, key: Hashable, entry: CacheEntry) -> None:
        """Remember an entry that left device and host, instead of ``policy.remove``. KV of named
        sessions is not kept: their state says whether it will be used."""
        if not self._policy.ghost_turnovers or entry.session_state != SessionState.UNKNOWN:
            self._policy.remove(entry)
            return
        if (older := self._pop(namespace, key)) is not None:
            self._policy.remove(older)
        self._keys.setdefault(namespace, {})[key] = entry
        self._dropped_at[namespace, key] = self._policy.clock
        self._expire()

    def recall(self, namespace: Hashable, keys: Iterable[Hashable], entry: CacheEntry) -> None:
        """Record that the KV of these keys was computed again, as part of the new ``entry``."""
        known = self._keys.get(namespace)
        if known is None:
            return
        for key in [key for key in keys if key in known]:
            ghost = self._pop(namespace, key)
            assert ghost is not None
            self._policy.visit((ghost,))
            entry.turns_recalled = max(entry.turns_recalled, ghost.turns)

    def clear(self) -> None:
        """Forget all ghosts, after a reset of the tree."""
        self._expire(0)

    def _expire(self, most: int = MOST_GHOSTS) -> None:
        oldest = self._policy.clock - self._policy.ghost_turnovers
        while self._dropped_at:
            (namespace, key), dropped_at = next(iter(self._dropped_at.items()))
            if dropped_at >= oldest and len(self._dropped_at) <= most:
                break
            ghost = self._pop(namespace, key)
            assert ghost is not None
            self._policy.remove(ghost)

    def _pop(self, namespace: Hashable, key: Hashable) -> CacheEntry | None:
        known = self._keys.get(namespace, {})
        ghost = known.pop(key, None)
        if ghost is not None:
            del self._dropped_at[namespace, key]
            if not known:
                del self._keys[namespace]
        return ghost


class PrefixHash:
    """Hashes of all beginnings of a token sequence: a sum over its tokens, so that it can be
    continued from any of them. The same in all processes. Not secure against collisions, which
    mislead statistics only."""

    def __init__(self) -> None:
        self._weights: NDArray[np.uint64] = np.ones(1, np.uint64)

    def after(self, begin: int, num_before: int, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Hashes after each of ``tokens``.

        Args:
            begin: Hash of the ``num_before`` tokens before them; 0 if there are none.
        """
        end = num_before + len(tokens)
        while len(self._weights) < end:  # powers of an odd number, modulo 2 ** 64
            factor = self._weights[-1:] * _WEIGHT
            self._weights = np.concatenate([self._weights, self._weights * factor])
        mixed = (tokens.astype(np.uint64) + _ONE) * _MIX
        mixed ^= mixed >> _SHIFT
        hashes: NDArray[np.uint64] = np.cumsum(mixed * self._weights[num_before:end])
        return hashes + np.uint64(begin)


_WEIGHT, _MIX = np.uint64(0xD6E8FEB86659FD93), np.uint64(0x9E3779B97F4A7C15)
_ONE, _SHIFT = np.uint64(1), np.uint64(29)
