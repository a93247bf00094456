"""Agreement between the tensor-parallel ranks of a scheduler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

_WORDS, _WORD_BYTES = 2, 7  # size of a text's digest; a word is below 2**56


class Ranks:
    """The tensor-parallel ranks that share one KV pool.

    Every call is a collective: all ranks make it at the same point, with lists of equal length.

    Args:
        cache: The ``UnifiedRadixCache``, whose process groups are used.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    @property
    def is_alone(self) -> bool:
        return bool(self._cache.tp_world_size == 1)

    def least(self, values: list[int]) -> list[int]:
        """The minimum over all ranks, value by value."""
        if self.is_alone:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        self._cache._all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        agreed: list[int] = tensor.tolist()
        return agreed


DIGEST_VALUES = 2 * _WORDS
"""Number of values that ``digest_values`` returns."""


def digest_values(text: str | None) -> list[int]:
    """A digest of a text as integers, to be reduced by ``Ranks.least`` and compared by
    ``are_equal``. None differs from every text.
    """
    digest = hashlib.blake2b(repr(text).encode(), digest_size=_WORDS * _WORD_BYTES).digest()
    words = [
        int.from_bytes(digest[i : i + _WORD_BYTES], "little")
        for i in range(0, len(digest), _WORD_BYTES)
    ]
    return [*words, *(-word for word in words)]


def are_equal(agreed: Sequence[int]) -> bool:
    """Whether all ranks have the same text; ``agreed`` is the minimum of their
    ``digest_values``."""
    least, most = agreed[:_WORDS], [-value for value in agreed[_WORDS:]]
    return list(least) == most
