"""Tiles for a layer of experts: which (token row, chosen expert) uses which adapter's matrices.

A route is one (row of the batch, chosen expert); route ``row * k + j`` is the row's expert number
j of k. Each adapter has a matrix per expert, so a tile has routes of one adapter and one expert.
``lora_shrink`` and ``lora_expand`` compute routes as they compute rows: ``routed_tiles`` makes a
table whose records hold the offsets of one expert and whose rows are routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK, BatchTables, max_tiles
from sglang_elora.kernels.stacked_module import StackedModule

MOST_SINGLE_ROUTES = 512
"""Most routes that have a tile each: 64 tokens with 8 experts. So few routes rarely share a matrix,
because an adapter may have more than 100 experts; and grouping takes about 20 launches more, per
layer. Raising it reads the matrices of shared experts more often. Not measured on a GPU."""

SINGLE_TILE_ROWS = 16
"""Rows of a tile with one route: the fewest that tensor cores multiply."""

_BLOCK = 16  # tiles that a program writes


@dataclass(frozen=True, slots=True)
class RoutedTiles:
    """A batch's routes as ``lora_shrink`` and ``lora_expand`` read them.

    Args:
        tiles: int32 ``[num_tiles, record_ints]``, as of ``BatchTables`` with the offsets of one
            expert. Their number depends on sizes only; surplus tiles have no routes.
        rows: int32 ``[T * k]``: route numbers. Those of one tile are adjacent.
        tile_rows: Most routes of a tile.
    """

    tiles: torch.Tensor
    rows: torch.Tensor
    tile_rows: int

    @property
    def addresses(self) -> torch.Tensor:
        """The memory of ``tiles``, as int64."""
        return self.tiles.view(-1).view(torch.int64)

    @property
    def num_tiles(self) -> int:
        return len(self.tiles)

    @property
    def record_ints(self) -> int:
        record_ints: int = self.tiles.shape[1]
        return record_ints


Tiles: TypeAlias = BatchTables | RoutedTiles
"""What ``lora_shrink`` and ``lora_expand`` compute: a batch's rows, or its routes to experts."""


@triton.jit(do_not_specialize=["num_tiles", "top_k"], do_not_specialize_on_alignment=["topk_ids"])
def _routed_tiles(
    owner_tiles,
    owners,
    topk_ids,
    firsts,
    ends,
    tiles,
    rows,
    num_tiles,
    top_k,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ELEMS: tl.constexpr,
    RECORD: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RECORD: tl.constexpr,
):
    """One program writes the records of BLOCK tiles.

    COLUMNS are the positions in a record of the offsets of modules with experts; BLOCK_ELEMS the
    elements of one expert's matrix per rank, for each. Without ``firsts`` and ``ends``, each tile
    has one route, and the program writes ``rows`` too.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = tile < num_tiles
    if firsts is None:
        first = tile
        route = tile
        tl.store(rows + tile, route, mask=in_range)
        used = in_range
    else:
        first = tl.load(firsts + tile, mask=in_range, other=0)
        end = tl.load(ends + tile, mask=in_range, other=0)
        used = first < end
        route = tl.load(rows + first, mask=used, other=0)
    owner = tl.load(owners + route // top_k, mask=used, other=-1)
    expert = tl.load(topk_ids + route, mask=used, other=-1)
    if firsts is None:
        used = (owner >= 0) & (expert >= 0) & (expert < NUM_EXPERTS)
        end = first + used.to(tl.int32)
    owner = tl.where(used, owner, 0)
    expert = tl.where(used, expert, 0).to(tl.int32)

    column = tl.arange(0, BLOCK_RECORD)[None, :]
    mask = used[:, None] & (column < RECORD)
    record = tl.load(owner_tiles + owner[:, None] * RECORD + column, mask=mask, other=0)
    rank = tl.load(owner_tiles + owner * RECORD + RANK, mask=used, other=0)
    elems = tl.zeros((1, BLOCK_RECORD), dtype=tl.int32)
    for i in tl.static_range(len(COLUMNS)):
        elems = tl.where(column == COLUMNS[i], BLOCK_ELEMS[i], elems)
    # A module that the adapter lacks has a negative offset, which stays. Other columns add 0.
    record += tl.where(record >= 0, (expert * rank)[:, None] * elems, 0)
    record = tl.where(column == FIRST, first[:, None], record)
    record = tl.where(column == END, end[:, None], record)
    mask = in_range[:, None] & (column < RECORD)
    tl.store(tiles + tile[:, None] * RECORD + column, record, mask=mask)


def routed_tiles(
    tables: BatchTables, topk_ids: torch.Tensor, modules: Sequence[StackedModule]
) -> RoutedTiles:
    """The tiles of a batch's routes, on the current stream.

    Neither synchronises with the host nor uses sizes that depend on data, so that a CUDA graph can
    capture it. The result is valid for the batch that ``tables`` holds when it is computed.

    Args:
        tables: The batch, with ``has_experts``.
        topk_ids: int32 or int64 ``[T, k]``, contiguous, with T from the batch's number of rows to
            the tables': experts that each row is routed to. Those outside of 0 to ``num_experts``
            are dropped.
        modules: The modules with experts; all have the same number of them.

    Returns:
        Tiles for all routes of rows with an adapter: one each if there are few, otherwise of at
        most ``tables.tile_rows`` routes to the same expert of the same adapter.
    """
    T, top_k = topk_ids.shape
    assert len(tables.owners) >= T, (T, len(tables.owners))
    assert topk_ids.is_contiguous()
    (num_experts,) = {module.num_experts for module in modules}
    num_routes = T * top_k
    firsts = ends = None
    if num_routes <= MOST_SINGLE_ROUTES:
        tile_rows, num_tiles = min(SINGLE_TILE_ROWS, tables.tile_rows), num_routes
        rows = torch.empty(num_routes, dtype=torch.int32, device=topk_ids.device)
    else:
        tile_rows = tables.tile_rows
        num_groups = min(num_routes, tables.max_adapters * num_experts)
        num_tiles = max_tiles(num_routes, num_groups, tile_rows)
        rows, firsts, ends = _grouped(tables, topk_ids, num_experts, num_tiles)
    tiles = rows.new_empty(num_tiles, tables.record_ints)
    if num_tiles > 0:
        _routed_tiles[(triton.cdiv(num_tiles, _BLOCK),)](
            tables.tiles,
            tables.owners,
            topk_ids,
            firsts,
            ends,
            tiles,
            rows,
            num_tiles,
            top_k,
            NUM_EXPERTS=num_experts,
            COLUMNS=tuple(OFFSETS + 2 * module.index + b for module in modules for b in (0, 1)),
            BLOCK_ELEMS=tuple(n for module in modules for n in (module.a_block, module.b_block)),
            RECORD=tables.record_ints,
            FIRST=FIRST,
            END=END,
            RANK=RANK,
            BLOCK=_BLOCK,
            BLOCK_RECORD=triton.next_power_of_2(tables.record_ints),
        )
    return RoutedTiles(tiles, rows, tile_rows)


def _grouped(
    tables: BatchTables, topk_ids: torch.Tensor, num_experts: int, num_tiles: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes grouped by adapter and expert, in order within a group, and cut into tiles.

    Returns:
        Route numbers, int32 ``[T * k]``, those without a tile last. The first and last + 1 index
        into them of each tile, int32 ``[num_tiles]``; equal for surplus tiles.
    """
    num_routes, device = topk_ids.numel(), topk_ids.device
    no_tile = tables.max_tiles * num_experts  # more than any key
    assert no_tile < 2**31, (tables.max_tiles, num_experts)
    owners = tables.owners[: len(topk_ids), None]
    dropped = (owners < 0) | (topk_ids < 0) | (topk_ids >= num_experts)
    keys = (owners * num_experts + topk_ids).masked_fill_(dropped, no_tile)
    keys, routes = keys.view(-1).sort(stable=True)
    # Number of tiles that begin at or before each route; a group's begin every tile_rows routes.
    within = torch.arange(num_routes, device=device) - torch.searchsorted(keys, keys)
    begins = (within % tables.tile_rows == 0) & (keys < no_tile)
    begun = begins.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(1, num_tiles + 1, dtype=torch.int32, device=device)
    firsts = torch.searchsorted(begun, numbers, out_int32=True)  # num_routes for surplus tiles
    key = keys[firsts.clamp(max=num_routes - 1)]
    ends = torch.searchsorted(keys, key, right=True, out_int32=True)
    ends = torch.minimum(ends, firsts + tables.tile_rows)
    return routes.to(torch.int32), firsts, ends
