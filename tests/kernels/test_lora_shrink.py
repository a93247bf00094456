"""``lora_shrink`` against its reference in float32, every element written in its place only."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import ShrinkConfig, lora_shrink, reference
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

CONFIG = ShrinkConfig(
    block_n=32,
    block_k=64,
    lanes=1,
    num_splits=1,
    max_tile_programs=256,
    num_warps=4,
    num_stages=2,
)


def check(
    world: KernelWorld,
    shape: ModuleShape,
    segments: Segments,
    *,
    config: ShrinkConfig = CONFIG,
    tile_rows: int = 16,
    spare_width: int = 5,
    spare_rows: int = 2,
) -> torch.Tensor:
    """Kernel and reference agree, on all that is defined and on nothing else."""
    module = world.modules[shape.name]
    num_rows = sum(length for _, length in segments) + spare_rows
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, shape.in_features, generator=generator)
    x = x.to(DEVICE, world.planes.weight_dtype)
    tables = world.batch_tables(segments, tile_rows)
    width = len(shape.out_features) * max(world.ranks) + spare_width
    empty = torch.full((config.num_splits, num_rows, width), torch.nan, device=DEVICE)
    inner = lora_shrink(
        x,
        world.planes.plane(0, 0),
        tables,
        module,
        width=width,
        num_tiles=tables.num_tiles,
        config=config,
        out=empty.clone(),
    )
    expected = reference.lora_shrink(
        x,
        world.planes.plane(0, 0),
        rows_of(segments, len(world.ranks)),
        [table.slots for table in world.tables],
        world.ranks,
        world.scalings,
        world.a_offsets(shape.name),
        module,
        empty[0].clone(),
    )
    defined = ~expected.isnan()
    assert torch.equal(~inner.isnan(), defined.expand_as(inner)), "written elsewhere, or not at all"
    torch.testing.assert_close(
        inner.sum(dim=0)[defined], expected[defined], **TOLERANCES[world.planes.weight_dtype]
    )
    return inner


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
    check(make_world(SHAPES, [8, 24], num_planes=1), OUT, [(1, 2), (0, 1)])


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    "config",
    [
        ShrinkConfig(16, 16, 1, 1, 256, 4, 2),
        ShrinkConfig(64, 128, 1, 1, 256, 4, 2),  # wider than the module
        ShrinkConfig(16, 32, 3, 1, 256, 4, 2),  # rows of A shared by programs
        ShrinkConfig(32, 16, 1, 4, 256, 4, 2),  # columns shared
        ShrinkConfig(16, 32, 2, 8, 256, 4, 2),  # some share nothing: they write zeros
        ShrinkConfig(32, 64, 1, 2, 2, 4, 2),  # programs of several tiles
    ],
    ids=str,
)
def test_launches(config: ShrinkConfig, tile_rows: int) -> None:
    world = make_world(SHAPES, [8, 24, 40], lacks=lacks)
    segments = [(0, 20), (-1, 1), (1, 3), (2, 17)]
    check(world, QKV, segments, config=config, tile_rows=tile_rows)


def test_splits_do_not_depend_on_the_neighbours() -> None:
    """Bit by bit: a row's result is that of the row alone."""
    world = make_world(SHAPES, [8, 24, 40])
    together = check(world, QKV, [(0, 1), (1, 1), (2, 1)], spare_rows=0)
    x = torch.randn(3, QKV.in_features, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for i in range(3):
        tables = world.batch_tables([(i, 1)], 16)
        alone = lora_shrink(
            x[i : i + 1],
            world.planes.plane(0, 0),
            tables,
            world.modules["qkv_proj"],
            width=3 * world.ranks[i],
            num_tiles=1,
            config=CONFIG,
        )
        assert torch.equal(alone[0, 0], together[0, i, : 3 * world.ranks[i]])


def test_rows_of_a_wider_tensor() -> None:
    """Rows may lie apart."""
    world = make_world([OUT], [8])
    wide = torch.randn(4, 200, device=DEVICE)
    arguments = {
        "width": 8,
        "num_tiles": 1,
        "config": CONFIG,
    }
    tables = world.batch_tables([(0, 4)], 16)
    plane, module = world.planes.plane(0, 0), world.modules["o_proj"]
    apart = lora_shrink(wide[:, :128], plane, tables, module, **arguments)
    adjacent = lora_shrink(wide[:, :128].contiguous(), plane, tables, module, **arguments)
    assert torch.equal(apart, adjacent)


def test_no_rows_at_all() -> None:
    check(make_world([OUT], [8]), OUT, [], spare_rows=0)


def test_wrong_sizes_are_found() -> None:
    world = make_world([OUT], [8])
    tables = world.batch_tables([(0, 4)], 16)
    plane, module = world.planes.plane(0, 0), world.modules["o_proj"]
    with pytest.raises(AssertionError, match="96"):
        lora_shrink(
            torch.zeros(4, 96, device=DEVICE),
            plane,
            tables,
            module,
            width=8,
            num_tiles=1,
            config=CONFIG,
        )
    with pytest.raises(AssertionError):
        lora_shrink(
            torch.zeros(4, 128, device=DEVICE).half(),
            plane,
            tables,
            module,
            width=8,
            num_tiles=1,
            config=CONFIG,
        )
