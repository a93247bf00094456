"""Rows grouped by adapter and cut into tiles, against the definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sglang_elora.kernels import MISSING, Batch, BatchTables, adapter_record
from sglang_elora.kernels.batch_tables import (
    END,
    FIRST,
    OFFSETS,
    RANK,
    SCALING,
    max_tiles,
    record_ints,
)

Segments = list[tuple[int, int]]
CPU = torch.device("cpu")  # no test here depends on the device


def empty_records(count: int) -> np.ndarray:
    """Records whose rank identifies their adapter."""
    records = np.zeros((count, record_ints(1)), dtype=np.int32)
    records[:, RANK] = np.arange(count)
    return records


def tables_for(segments: Segments, num_adapters: int, tile_rows: int) -> BatchTables:
    num_rows = sum(length for _, length in segments)
    tables = BatchTables(
        CPU,
        num_modules=1,
        max_rows=num_rows,
        max_adapters=num_adapters,
        tile_rows=tile_rows,
    )
    tables.load(Batch(empty_records(num_adapters), segments))
    return tables


def tables_with_experts(max_rows: int, num_adapters: int, num_modules: int = 1) -> BatchTables:
    return BatchTables(
        CPU,
        num_modules=num_modules,
        max_rows=max_rows,
        max_adapters=num_adapters,
        tile_rows=2,
        has_experts=True,
    )


def read(tables: BatchTables) -> list[tuple[int, list[int]]]:
    """Return the tiles: adapter and rows of each."""
    used = tables.tiles[: tables.num_tiles, [RANK, FIRST, END]].tolist()
    assert not tables.tiles[tables.num_tiles :].any(), "tiles behind the batch have rows"
    return [(adapter, tables.rows[first:end].tolist()) for adapter, first, end in used]


def test_batch_tables_tiles_equal_a_hand_computed_case() -> None:
    segments = [(1, 2), (-1, 1), (0, 1), (1, 3), (2, 0)]
    assert read(tables_for(segments, 3, tile_rows=4)) == [(0, [3]), (1, [0, 1, 4, 5]), (1, [6])]


@pytest.mark.parametrize("seed", range(50))
def test_batch_tables_tiles_cover_each_row_once(seed: int) -> None:
    rng = random.Random(seed)
    num_adapters, tile_rows = rng.randint(1, 20), rng.choice([1, 4, 16])
    segments = [
        (rng.randint(-1, num_adapters - 1), rng.choice([0, 1, 1, 5, 40]))
        for _ in range(rng.randint(0, 30))
    ]
    tables = tables_for(segments, num_adapters, tile_rows)
    owners = [adapter for adapter, length in segments for _ in range(length)]
    seen = []
    for adapter, rows in read(tables):
        assert 0 < len(rows) <= tile_rows
        assert rows == sorted(rows) and {owners[row] for row in rows} == {adapter}
        seen += rows
    assert sorted(seen) == [row for row, owner in enumerate(owners) if owner >= 0]
    assert tables.num_tiles <= tables.max_tiles


@pytest.mark.parametrize("num_rows", range(20))
def test_max_tiles_is_a_tight_upper_bound(num_rows: int) -> None:
    """By all ways to deal so few rows to three adapters."""
    most = 0
    for first in range(num_rows + 1):
        for second in range(num_rows + 1 - first):
            counts = (first, second, num_rows - first - second)
            most = max(most, sum(-(-count // 4) for count in counts))
    assert max_tiles(num_rows, num_adapters=3, tile_rows=4) == most


def test_batch_tables_keep_their_addresses_and_drop_old_tiles() -> None:
    """A captured graph relies on both."""
    tables = BatchTables(CPU, num_modules=1, max_rows=8, max_adapters=4, tile_rows=2)
    addresses = [view.data_ptr() for view in (tables.addresses, tables.tiles, tables.rows)]
    tables.load(Batch(empty_records(4), [(3, 5), (0, 3)]))
    assert len(read(tables)) == 5
    tables.load(Batch(empty_records(1), [(-1, 4), (0, 2)]))
    assert read(tables) == [(0, [4, 5])]
    tables.load(Batch(empty_records(0), [(-1, 8)]))
    assert read(tables) == []
    tables.load(Batch(empty_records(0), []))
    assert read(tables) == []
    assert addresses == [view.data_ptr() for view in (tables.addresses, tables.tiles, tables.rows)]


@pytest.mark.parametrize(("num_rows", "num_adapters"), [(9, 1), (5, 5)])
def test_batch_tables_refuse_batches_that_do_not_fit(num_rows: int, num_adapters: int) -> None:
    tables = BatchTables(CPU, num_modules=1, max_rows=8, max_adapters=4, tile_rows=2)
    with pytest.raises(ValueError, match="exceed tables for 8 rows of 4 adapters"):
        tables.load(Batch(empty_records(num_adapters), [(0, num_rows)]))


def test_adapter_record_holds_slots_rank_scaling_and_offsets() -> None:
    table = torch.tensor([5, 3, 9], dtype=torch.int32)
    record = adapter_record(table, 24, 0.75, [(0, 64), (MISSING, MISSING)])
    tables = BatchTables(CPU, num_modules=2, max_rows=1, max_adapters=3, tile_rows=16)
    tables.load(Batch(np.stack([record * 0, record]), [(1, 1)]))
    assert int(tables.addresses[0]) == table.data_ptr()
    tile = tables.tiles[0]
    assert int(tile[RANK]) == 24
    assert float(tile[SCALING : SCALING + 1].view(torch.float32)) == 0.75
    assert tile[OFFSETS:].tolist() == [0, 64, -1, -1]
    assert Batch(np.stack([record]), [(0, 1)]).max_rank == 24
    assert Batch(np.stack([record])[:0], [(-1, 1)]).max_rank == 0


def test_batch_tables_distinguish_1000_adapters() -> None:
    """More adapters than one byte can number."""
    segments = [(adapter, 1) for adapter in reversed(range(1000))]
    assert read(tables_for(segments, 1000, 16)) == [(i, [999 - i]) for i in range(1000)]


def test_batch_tables_owners_are_each_rows_adapters_first_tile() -> None:
    """And -1 for rows without an adapter, for rows after the batch's, and before the first."""
    tables = tables_with_experts(max_rows=9, num_adapters=3)
    assert tables.owners.tolist() == [-1] * 9
    address = tables.owners.data_ptr()
    tables.load(Batch(empty_records(3), [(2, 1), (-1, 1), (0, 3), (2, 2), (1, 0), (0, 2)]))
    assert read(tables) == [(0, [2, 3]), (0, [4, 7]), (0, [8]), (2, [0, 5]), (2, [6])]
    assert tables.owners.tolist() == [3, -1, 0, 0, 0, 3, 3, 0, 0]
    tables.load(Batch(empty_records(2), [(1, 2), (0, 1), (-1, 1)]))
    assert read(tables) == [(0, [2]), (1, [0, 1])]
    assert tables.owners.tolist() == [1, 1, 0, *[-1] * 6]
    tables.load(Batch(empty_records(0), []))
    assert read(tables) == [] and tables.owners.tolist() == [-1] * 9
    assert tables.owners.data_ptr() == address


def test_batch_tables_have_no_owners_without_experts() -> None:
    tables = tables_for([(0, 3)], 1, tile_rows=2)
    assert len(tables.owners) == 0 and tables.tiles.untyped_storage().nbytes() == 4 * (16 + 3)


@pytest.mark.parametrize("num_modules", range(1, 10))
@pytest.mark.parametrize("num_rows", range(1, 10))
def test_batch_tables_owners_and_rows_are_16_byte_aligned(num_rows: int, num_modules: int) -> None:
    tables = tables_with_experts(num_rows, num_rows, num_modules)
    assert tables.owners.data_ptr() % 16 == tables.rows.data_ptr() % 16 == 0
    assert len(tables.owners) == len(tables.rows) == num_rows


@pytest.mark.parametrize("num_modules", range(1, 10))
@pytest.mark.parametrize("num_tiles", range(1, 10))
def test_batch_tables_rows_are_16_byte_aligned(num_modules: int, num_tiles: int) -> None:
    """Triton would compile the kernels a second time for tables whose rows do not."""
    tables = BatchTables(
        CPU, num_modules=num_modules, max_rows=num_tiles, max_adapters=num_tiles, tile_rows=16
    )
    assert tables.max_tiles == num_tiles
    assert tables.rows.data_ptr() % 16 == 0
    assert len(tables.rows) == num_tiles and len(tables.addresses) == tables.tiles.numel() // 2
