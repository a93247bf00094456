"""``lora_expand`` against its reference in float32, every element written in its place only."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import ExpandConfig, lora_expand, reference
from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import (
    GATE_UP,
    MIXES,
    OUT,
    POOLS,
    QKV,
    RANKS,
    SHAPES,
    Segments,
    lacks,
)
from tests.harness.kernel_world import DEVICE, ORDERS, KernelWorld, make_world, rows_of
from tests.harness.tolerances import TOLERANCES

CONFIG = ExpandConfig(block_n=64, block_r=16, max_tile_programs=256, num_warps=4, num_stages=2)


def check(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    config: ExpandConfig = CONFIG,
    tile_rows: int = 16,
    num_splits: int = 1,
    spare_columns: int = 3,
    spare_rows: int = 2,
) -> None:
    """Kernel and reference agree where adapters compute; all else keeps every bit."""
    dtype, module = world.planes.weight_dtype, world.modules[shape.name]
    parts, out = len(shape.out_features), sum(shape.out_features)
    num_rows = sum(length for _, length in segments) + spare_rows
    rows = rows_of(segments, len(world.ranks))
    width = parts * max(world.ranks) + 5
    generator = torch.Generator().manual_seed(num_rows)
    inner = torch.full((num_splits, num_rows, width), torch.nan, device=DEVICE)  # undefined
    owned = torch.zeros(num_rows, dtype=torch.bool, device=DEVICE)
    for own, rank, offset in zip(rows, world.ranks, world.b_offsets(shape.name), strict=True):
        if offset >= 0:
            values = torch.randn(num_splits, len(own), parts * rank, generator=generator)
            inner[:, own, : parts * rank] = (values / num_splits).to(DEVICE)
            owned[own] = True
    base = torch.randn(num_rows, out + spare_columns, generator=generator).to(DEVICE, dtype)
    tables = world.batch_tables(segments, tile_rows)
    plane = world.planes.plane(-1, 0)
    output = base.clone()
    returned = lora_expand(
        inner, plane, tables, module, output, num_tiles=tables.num_tiles, config=config
    )
    assert returned is output
    expected = reference.lora_expand(
        inner.sum(dim=0).to(dtype).float(),  # as it is rounded between the two halves
        plane,
        rows,
        [table.slots for table in world.tables],
        world.ranks,
        world.b_offsets(shape.name),
        module,
        base[:, :out].float(),
    )
    torch.testing.assert_close(output[owned, :out].float(), expected[owned], **TOLERANCES[dtype])
    assert torch.equal(output[~owned], base[~owned]), "rows of nobody changed"
    assert torch.equal(output[:, out:], base[:, out:]), "columns behind the output changed"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, shape: ModuleShape) -> None:
    ranks, segments = MIXES[mix]
    check(make_world(SHAPES, ranks, lacks=lacks), shape, segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_dtypes_and_slots(order: str, dtype: torch.dtype) -> None:
    world = make_world(SHAPES, RANKS, dtype=dtype, order=order, lacks=lacks)
    check(world, QKV, [(i, 2) for i in range(len(RANKS))])


@pytest.mark.parametrize("rank", [*RANKS, 256])
def test_ranks(rank: int) -> None:
    check(make_world([OUT], [rank], dtype=torch.bfloat16), OUT, [(0, 3)])


@pytest.mark.parametrize(("kv_dtype", "kv_dim"), POOLS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pools(kv_dtype: torch.dtype, kv_dim: int, page_size: int) -> None:
    world = make_world(
        SHAPES, [3, 16], dtype=torch.bfloat16, kv_dtype=kv_dtype, kv_dim=kv_dim, page_size=page_size
    )
    check(world, GATE_UP, [(1, 2), (0, 1)])


def test_one_plane() -> None:
    """B behind A in the same plane."""
    check(make_world(SHAPES, [8, 24], num_planes=1), OUT, [(1, 2), (0, 1)])


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    "config",
    [
        ExpandConfig(16, 16, 256, 4, 2),
        ExpandConfig(256, 32, 256, 4, 2),  # wider than any part
        ExpandConfig(32, 64, 256, 4, 2),
        ExpandConfig(64, 16, 2, 4, 2),  # programs of several tiles
    ],
    ids=str,
)
def test_launches(config: ExpandConfig, tile_rows: int, num_splits: int) -> None:
    world = make_world(SHAPES, [8, 24, 40], lacks=lacks)
    segments = [(0, 20), (-1, 1), (1, 3), (2, 17)]
    check(world, QKV, segments, config=config, tile_rows=tile_rows, num_splits=num_splits)


def test_rounds_once_per_half() -> None:
    """As SGLang's kernels: the sum of the splits is rounded, and the sum with the base output."""
    world = make_world([OUT], [1], dtype=torch.bfloat16)
    world.planes.plane(-1, 0).zero_()
    slots = world.tables[0].slots.long()
    world.planes.plane(-1, 0)[slots] = 3.0
    tables = world.batch_tables([(0, 1)], 16)
    inner = torch.tensor([[[1.0]], [[2**-9]]], device=DEVICE)  # bfloat16 of the sum is 1
    output = torch.full((1, 96), 2**-7, dtype=torch.bfloat16, device=DEVICE)
    lora_expand(
        inner,
        world.planes.plane(-1, 0),
        tables,
        world.modules["o_proj"],
        output,
        num_tiles=1,
        config=CONFIG,
    )
    assert torch.equal(output, torch.full_like(output, (torch.tensor(3 + 2**-7)).bfloat16()))


def test_no_rows_at_all() -> None:
    check(make_world([OUT], [8]), OUT, [], spare_rows=0)


def test_wrong_sizes_are_found() -> None:
    world = make_world([OUT], [8])
    tables, module = world.batch_tables([(0, 4)], 16), world.modules["o_proj"]
    plane, inner = world.planes.plane(-1, 0), torch.zeros(1, 4, 8, device=DEVICE)
    wrong = (torch.zeros(4, 95), torch.zeros(3, 96), torch.zeros(4, 96).half())
    for output in (tensor.to(DEVICE) for tensor in wrong):
        with pytest.raises(AssertionError):
            lora_expand(inner, plane, tables, module, output, num_tiles=1, config=CONFIG)
