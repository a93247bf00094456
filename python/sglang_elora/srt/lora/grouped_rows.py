"""LoRA in eager torch, one adapter at a time: the rows of each adapter and its matrix products.

Used by ``elora_torch``, whose weights lie in pages, and by ``stock.grouped_backend``, whose weights
lie in SGLang's slots, so that both compute at the same cost.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeAlias, TypeVar

import torch

Index: TypeAlias = slice | torch.Tensor
"""The rows of one adapter in a batch: a slice if adjacent, otherwise int64 indices."""

Key = TypeVar("Key", bound=Hashable)


def rows_by_adapter(
    segments: Iterable[tuple[Key | None, int]], device: torch.device
) -> tuple[dict[Key, Index], int]:
    """The rows of each adapter, and the number of rows.

    Args:
        segments: (adapter or None, number of rows) in row order; segments of one adapter are
            merged, also if others lie between them.
    """
    pieces: dict[Key, list[range]] = {}
    start = 0
    for key, length in segments:
        end = start + length
        if key is not None and length:
            ranges = pieces.setdefault(key, [])
            if ranges and ranges[-1].stop == start:
                ranges[-1] = range(ranges[-1].start, end)
            else:
                ranges.append(range(start, end))
        start = end
    return {key: _index(ranges, device) for key, ranges in pieces.items()}, start


def shrink_rows(
    x: torch.Tensor, index: Index, a: torch.Tensor, scaling: float, output: torch.Tensor
) -> None:
    """Set the first ``len(a)`` columns of the rows of ``output`` to ``x @ A^T * scaling``.

    Args:
        x: ``[rows, in_features]``.
        a: ``[parts * rank, in_features]``.
        output: ``[rows, at least parts * rank]``.
    """
    rows = output[index, : len(a)]
    rows.addmm_(x[index], a.T, beta=0, alpha=scaling)
    if not isinstance(index, slice):  # rows is a copy
        output[index, : len(a)] = rows


def expand_rows(
    inner: torch.Tensor,
    index: Index,
    parts: Iterable[tuple[int, int, torch.Tensor]],
    rank: int,
    output: torch.Tensor,
) -> None:
    """Add ``inner @ B^T`` to the rows of ``output``, part by part.

    Args:
        inner: Result of ``shrink_rows``.
        parts: (first column, last column + 1, B^T ``[rank, columns]``) of each part, in order.
    """
    own_inner, own_output = inner[index], output[index]
    for part, (start, end, b) in enumerate(parts):
        own_output[:, start:end].addmm_(own_inner[:, part * rank : (part + 1) * rank], b)
    if not isinstance(index, slice):  # own_output is a copy
        output.index_copy_(0, index, own_output)


def _index(ranges: Sequence[range], device: torch.device) -> Index:
    if len(ranges) == 1:
        return slice(ranges[0].start, ranges[0].stop)
    return torch.tensor([row for rows in ranges for row in rows], device=device)
