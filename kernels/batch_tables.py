"""The description of one forward pass that LoRA kernels read: which rows use which adapter.

The rows of a forward pass are grouped by adapter and cut into tiles. The description lies in one
device buffer with a fixed address, so a captured CUDA graph computes what the buffer holds at
replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FIRST, END, RANK, SCALING, OFFSETS = 2, 3, 4, 5, 6
"""Positions in a record, in int32. After the address of the page table (two int32): the first and
last + 1 index into ``rows``, the adapter's rank and scaling (float bits), then per module the
offsets of A and B."""

ALIGNED_INTS = 4
"""``rows`` and ``owners`` begin at multiples of this many int32, 16 bytes. Triton compiles a kernel
separately for pointers that are multiples of 16 bytes and for others; so all tables share one
kernel."""

MISSING = -1  # offset of a module for which an adapter has no weights


def adapter_record(
    table: torch.Tensor, rank: int, scaling: float, offsets: Sequence[tuple[int, int]]
) -> NDArray[np.int32]:
    """The record of one adapter as kernels read it, with no rows set.

    Args:
        table: int32 ``[num_slots]`` on the device, the adapter's slots in the order of its
            addresses. Its memory has to outlive the forward passes that use the record.
        rank: Rows of A per part, and rows of B's transpose.
        scaling: Factor applied between A and B.
        offsets: Per module, addresses of A and B in their planes, in elements, or ``MISSING``.

    Returns:
        int32 ``[record_ints(modules)]``.
    """
    assert table.dtype == torch.int32 and table.is_contiguous()
    record = np.zeros(record_ints(len(offsets)), dtype=np.int32)
    record[:2].view(np.int64)[0] = table.data_ptr()
    record[RANK] = rank
    record[SCALING : SCALING + 1].view(np.float32)[0] = scaling
    record[OFFSETS:] = np.asarray(offsets, dtype=np.int32).reshape(-1)
    return record


def record_ints(num_modules: int) -> int:
    """Number of int32 of a record; even, because a record begins with an int64."""
    return OFFSETS + 2 * num_modules


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: its adapters' records and the rows of each.

    Args:
        records: int32 ``[adapters, record_ints]``.
        segments: ``(index into records, or -1 for the base model, number of rows)`` in row order.
    """

    records: NDArray[np.int32]
    segments: Sequence[tuple[int, int]]

    @property
    def num_rows(self) -> int:
        return sum(length for _, length in self.segments)

    @property
    def max_rank(self) -> int:
        """Largest rank of the batch's adapters; 0 if there are none."""
        return int(self.records[:, RANK].max(initial=0))

    def row_adapters(self) -> NDArray[np.int16]:
        """Index into ``records`` of each row's adapter, or -1 for the base model."""
        if not self.segments:
            return np.empty(0, np.int16)
        adapters, lengths = np.array(self.segments, dtype=np.int64).T
        return np.repeat(adapters.astype(np.int16), lengths)

    def grouped(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Row numbers grouped by adapter, in row order within a group (int32), and the number of
        rows per adapter (int64 ``[adapters]``)."""
        adapters = self.row_adapters()
        order = np.argsort(adapters, kind="stable").astype(np.int32)
        counts = np.bincount(adapters[adapters >= 0], minlength=len(self.records))
        return order[len(order) - int(counts.sum()) :], counts


class BatchTables:
    """Static device memory for the descriptions of batches up to given sizes.

    ``tiles`` is int32 ``[max_tiles, record_ints]``: the record of a tile's adapter with the tile's
    rows, so that a program reads all it needs from one place; tiles after those of the batch have
    no rows. ``rows`` is int32 ``[max_rows]``: row numbers, grouped by adapter. ``owners`` is int32
    ``[max_rows]`` in row order: the number of the first tile of the row's adapter; -1 for rows
    without an adapter and for those after the batch's. It is empty without experts.

    Args:
        device: Device of the kernels.
        num_modules: Target modules of the model.
        max_rows: Most rows of a forward pass.
        max_adapters: Most distinct adapters in a forward pass.
        tile_rows: Most rows of a tile.
        has_experts: Whether a module has experts, for which ``routed_tiles`` reads ``owners``.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_modules: int,
        max_rows: int,
        max_adapters: int,
        tile_rows: int,
        has_experts: bool = False,
    ) -> None:
        self.max_rows = max_rows
        self.max_adapters = max_adapters
        self.tile_rows = tile_rows
        self.num_tiles = 0  # tiles of the batch loaded last
        self.record_ints = record_ints(num_modules)
        self.max_tiles = max_tiles(max_rows, max_adapters, tile_rows)
        tiles_end = self.max_tiles * self.record_ints
        self._owners_begin = _aligned(tiles_end)
        owners_end = self._owners_begin + (max_rows if has_experts else 0)
        self._rows_begin = _aligned(owners_end)
        self._buffer = torch.zeros(self._rows_begin + max_rows, dtype=torch.int32, device=device)
        self.tiles = self._buffer[:tiles_end].view(-1, self.record_ints)
        self.addresses = self._buffer[:tiles_end].view(torch.int64)
        self.owners = self._buffer[self._owners_begin : owners_end]
        self.rows = self._buffer[self._rows_begin :]
        if has_experts:
            self.owners.fill_(-1)

    def load(self, batch: Batch) -> None:
        """Write a batch to the tables, on the current stream. Does not block the host.

        Raises:
            ValueError: The batch is larger than the tables.
        """
        if batch.num_rows > self.max_rows or len(batch.records) > self.max_adapters:
            raise ValueError(
                f"{batch.num_rows} rows of {len(batch.records)} adapters exceed tables for "
                f"{self.max_rows} rows of {self.max_adapters} adapters"
            )
        rows, counts = batch.grouped()
        tiles, first_tiles = _tiles(batch.records, counts, self.tile_rows)
        self.num_tiles = len(tiles)
        used = self._rows_begin + len(rows)
        # New host memory for each batch: the copy of the previous batch may still be queued.
        host = torch.empty(used, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        ints = host.numpy()
        ints[: tiles.size] = tiles.reshape(-1)
        ints[tiles.size : self._owners_begin] = 0
        if len(self.owners):
            owners = ints[self._owners_begin : self._rows_begin]
            owners[: batch.num_rows] = np.append(first_tiles, -1)[batch.row_adapters()]
            owners[batch.num_rows :] = -1
        ints[self._rows_begin :] = rows
        self._buffer[:used].copy_(host, non_blocking=True)

    def tiles_for(self, num_rows: int) -> int:
        """Most tiles of a batch with ``num_rows`` rows."""
        return min(self.max_tiles, max_tiles(num_rows, self.max_adapters, self.tile_rows))


def max_tiles(num_rows: int, num_adapters: int, tile_rows: int) -> int:
    """Most tiles of a batch: the last tile of each adapter may be incomplete."""
    incomplete = min(num_rows, num_adapters)
    return incomplete + (num_rows - incomplete) // tile_rows


def _tiles(
    records: NDArray[np.int32], counts: NDArray[np.int64], tile_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tiles for adapters whose ``counts`` rows are adjacent, int32 ``[tiles, record_ints]``, and
    the number of the first tile of each adapter, int64 ``[adapters]``."""
    per_adapter = -(-counts // tile_rows)
    adapters = np.repeat(np.arange(len(counts)), per_adapter)
    first_tiles = np.cumsum(per_adapter) - per_adapter
    ends = np.cumsum(counts)
    within = np.arange(len(adapters)) - first_tiles[adapters]
    tiles = records[adapters]
    tiles[:, FIRST] = (ends - counts)[adapters] + within * tile_rows
    tiles[:, END] = np.minimum(tiles[:, FIRST] + tile_rows, ends[adapters])
    return tiles, first_tiles


def _aligned(num_ints: int) -> int:
    """``num_ints`` rounded up to a multiple of ``ALIGNED_INTS``."""
    return -(-num_ints // ALIGNED_INTS) * ALIGNED_INTS
