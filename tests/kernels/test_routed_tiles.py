"""``routed_tiles`` against its reference, and LoRA on experts against dense matrices."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_elora.kernels import (
    BatchTables,
    RoutedTiles,
    StackedModule,
    lora_expand,
    lora_shrink,
    reference,
    routed_tiles,
)
from sglang_elora.kernels.batch_tables import END, FIRST
from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import QKV, Segments
from tests.harness.kernel_checks import EXPAND, SHRINK
from tests.harness.kernel_world import DEVICE, KernelWorld, make_world
from tests.harness.tolerances import TOLERANCES

MODULE = import_module("sglang_elora.kernels.routed_tiles")
NUM_EXPERTS, TOP_K = 5, 3
GATE_UP = ModuleShape("gate_up_experts", 130, (70, 70), NUM_EXPERTS)
DOWN = ModuleShape("down_experts", 70, (130,), NUM_EXPERTS)
SHAPES = (GATE_UP, QKV, DOWN)
BATCHES: dict[str, tuple[list[int], Segments, int]] = {
    "one adapter": ([8], [(0, 4)], 0),
    "ranks interleaved with base rows": ([8, 24, 3], [(0, 2), (-1, 2), (2, 3), (1, 1), (0, 2)], 0),
    "padding rows": ([3, 8], [(1, 2), (0, 1)], 4),
    "more routes than a tile": ([8, 4], [(0, 30), (1, 9), (0, 1)], 0),
    "base rows only": ([8], [(-1, 3)], 2),
    "padding rows only": ([8], [], 3),
    "no rows": ([8], [], 0),
}
"""Ranks, segments, and rows after those of the batch."""


@pytest.fixture(params=["single", "grouped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How routes get tiles, for any number of them."""
    use(request.param, monkeypatch)
    return str(request.param)


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "MOST_SINGLE_ROUTES", 10**6 if way == "single" else 0)


def lacks(adapter: int, name: str) -> bool:
    """Every third adapter lacks a module of experts."""
    return adapter % 3 == 2 and name == "down_experts"


def random_ids(num_rows: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Experts of each row, some of them outside of 0 to NUM_EXPERTS."""
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(-1, NUM_EXPERTS + 1, (num_rows, TOP_K), generator=generator)
    return ids.to(DEVICE, dtype)


def experts_of(world: KernelWorld) -> list[StackedModule]:
    return [world.modules[shape.name] for shape in (GATE_UP, DOWN)]


def tables_of(world: KernelWorld, segments: Segments, spare: int, tile_rows: int) -> BatchTables:
    return world.batch_tables(segments, tile_rows, spare, has_experts=True)


def row_adapters(segments: Segments) -> list[int]:
    """Adapter of each row, -1 for the base model."""
    return [adapter for adapter, length in segments for _ in range(length)]


def check(routed: RoutedTiles, world: KernelWorld, segments: Segments, ids: torch.Tensor) -> None:
    """Each route that the reference has a record for is in one tile, whose record is the same."""
    expected = reference.routed_tiles(
        world.batch(segments).records.tolist(),
        row_adapters(segments),
        ids,
        experts_of(world),
    )
    assert (
        routed.addresses.data_ptr() == routed.tiles.data_ptr() and routed.addresses.is_contiguous()
    )
    assert len(routed.addresses) * 2 == routed.num_tiles * routed.record_ints
    assert all(t.data_ptr() % 16 == 0 for t in (routed.tiles, routed.rows))
    found: dict[int, list[int]] = {}
    for record in routed.tiles.tolist():
        first, end = record[FIRST], record[END]
        assert end - first <= routed.tile_rows
        record[FIRST] = record[END] = 0
        for route in routed.rows[first:end].tolist():
            assert route not in found, f"route {route} is in two tiles"
            found[route] = record
    assert found == {i: record for i, record in enumerate(expected) if record is not None}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch", BATCHES)
def test_routed_tiles_equal_the_reference(batch: str, dtype: torch.dtype, way: str) -> None:
    ranks, segments, padding = BATCHES[batch]
    world = make_world(SHAPES, ranks, lacks=lacks)
    ids = random_ids(len(row_adapters(segments)) + padding, dtype)
    tables = tables_of(world, segments, padding, tile_rows=16)
    check(routed_tiles(tables, ids, experts_of(world)), world, segments, ids)


@pytest.mark.parametrize("tile_rows", [4, 16, 64])
def test_routed_tiles_have_at_most_the_tables_tile_rows(tile_rows: int, way: str) -> None:
    world = make_world(SHAPES, [3, 8])
    segments = [(0, 25), (-1, 3), (1, 40)]
    ids = random_ids(68)
    tables = tables_of(world, segments, 0, tile_rows)
    routed = routed_tiles(tables, ids, experts_of(world))
    assert routed.tile_rows == (min(tile_rows, 16) if way == "single" else tile_rows)
    check(routed, world, segments, ids)


def test_routed_tiles_accept_a_table_full_of_distinct_groups(way: str) -> None:
    """As many tiles as the bound allows: no route shares a matrix with another."""
    world = make_world(SHAPES, [3, 8, 4])
    segments = [(i, 1) for i in range(3)]
    ids = torch.tensor([[0, 1, 2], [4, 3, 1], [2, 0, 4]], dtype=torch.int32, device=DEVICE)
    routed = routed_tiles(tables_of(world, segments, 0, 16), ids, experts_of(world))
    assert routed.num_tiles == 9
    check(routed, world, segments, ids)


@pytest.mark.parametrize("dropped", [-1, NUM_EXPERTS, 2**31 - 1])
def test_routed_tiles_are_empty_if_all_routes_are_dropped(dropped: int, way: str) -> None:
    world = make_world(SHAPES, [3])
    ids = torch.full((4, TOP_K), dropped, dtype=torch.int32, device=DEVICE)
    routed = routed_tiles(tables_of(world, [(0, 4)], 0, 16), ids, experts_of(world))
    assert torch.equal(routed.tiles[:, FIRST], routed.tiles[:, END])


def test_routed_tiles_of_a_batch_ignore_a_larger_earlier_one(way: str) -> None:
    """A captured graph computes as many rows as it was captured with."""
    world = make_world(SHAPES, [8, 24, 3], lacks=lacks)
    ids = random_ids(20)
    tables = tables_of(world, [(0, 9), (2, 4), (1, 7)], 0, 16)
    for segments in ([(1, 3), (-1, 2), (0, 1)], [(-1, 2)], []):
        tables.load(world.batch(segments))
        check(routed_tiles(tables, ids, experts_of(world)), world, segments, ids)


def test_routed_tiles_are_empty_before_a_batch_is_loaded(way: str) -> None:
    """As when a CUDA graph is captured."""
    tables = BatchTables(
        torch.device(DEVICE),
        num_modules=3,
        max_rows=4,
        max_adapters=2,
        tile_rows=16,
        has_experts=True,
    )
    routed = routed_tiles(tables, random_ids(4), experts_of(make_world(SHAPES, [3])))
    assert torch.equal(routed.tiles[:, FIRST], routed.tiles[:, END])


def test_routed_tiles_are_single_up_to_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(SHAPES, [3])
    ids = torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    tables = tables_of(world, [(0, 4)], 0, 16)
    for most_single, num_tiles in ((8, 8), (7, 5)):  # 5 experts of one adapter
        monkeypatch.setattr(MODULE, "MOST_SINGLE_ROUTES", most_single)
        assert routed_tiles(tables, ids, experts_of(world)).num_tiles == num_tiles


def test_routed_tiles_grouping_uses_shapes_only() -> None:
    """Tensors without data: reading an element, or a size that depends on one, is an error."""
    with FakeTensorMode():
        tables = BatchTables(
            torch.device("cpu"),
            num_modules=3,
            max_rows=300,
            max_adapters=4,
            tile_rows=16,
            has_experts=True,
        )
        ids = torch.empty(280, TOP_K, dtype=torch.int32)
        rows, firsts, ends = MODULE._grouped(tables, ids, NUM_EXPERTS, 70)
    assert rows.shape == (280 * TOP_K,) and firsts.shape == ends.shape == (70,)
    assert {tensor.dtype for tensor in (rows, firsts, ends)} == {torch.int32}


def test_routed_tiles_refuse_more_rows_than_the_tables_hold() -> None:
    world = make_world(SHAPES, [3])
    with pytest.raises(AssertionError, match=r"\(5, 4\)"):
        routed_tiles(tables_of(world, [(0, 4)], 0, 16), random_ids(5), experts_of(world))
    with pytest.raises(AssertionError, match=r"\(4, 0\)"):  # tables without experts
        routed_tiles(world.batch_tables([(0, 4)], 16), random_ids(4), experts_of(world))


def dense(
    world: KernelWorld, shape: ModuleShape, x: torch.Tensor, adapter: int, expert: int
) -> torch.Tensor:
    """``B @ A @ x * scaling`` of one expert, part by part, in float32."""
    rank, num_parts = world.ranks[adapter], len(shape.out_features)
    a, b = (matrix.to(DEVICE) for matrix in world.matrices[adapter][shape.name])
    a = a.view(NUM_EXPERTS, num_parts, rank, -1)[expert].float()
    parts = b.view(NUM_EXPERTS, -1, rank)[expert].float().split(shape.out_features)
    inner = (a @ x.float() * world.scalings[adapter]).to(x.dtype).float()
    return torch.cat([part @ inner[i] for i, part in enumerate(parts)])


def computed(
    world: KernelWorld,
    shape: ModuleShape,
    routed: RoutedTiles,
    x: torch.Tensor,
    output: torch.Tensor,
    rows_per_input: int,
) -> torch.Tensor:
    """The result of both kernels, in place."""
    module = world.modules[shape.name]
    width = module.inner_width(max(world.ranks))
    inner = lora_shrink(
        x,
        world.planes.plane(0, 0),
        routed,
        module,
        width=width,
        num_tiles=routed.num_tiles,
        config=SHRINK,
        rows_per_input=rows_per_input,
        out=torch.full((1, len(output), width), torch.nan, device=DEVICE),
    )
    return lora_expand(
        inner,
        world.planes.plane(-1, 0),
        routed,
        module,
        output,
        num_tiles=routed.num_tiles,
        config=EXPAND,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [GATE_UP, DOWN], ids=lambda shape: shape.name)
def test_lora_on_experts_equals_dense_matrices(
    shape: ModuleShape, dtype: torch.dtype, way: str
) -> None:
    """The first module's input is a row of the batch, the second's a row per route."""
    world = make_world(SHAPES, [8, 24, 3], dtype=dtype, lacks=lacks)
    segments = [(0, 2), (-1, 1), (2, 2), (1, 3), (0, 9)]
    num_rows = 17 + 2
    ids = random_ids(num_rows)
    rows_per_input = TOP_K if shape is GATE_UP else 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows * TOP_K // rows_per_input, shape.in_features, generator=generator)
    base = torch.randn(num_rows * TOP_K, sum(shape.out_features), generator=generator)
    x, base = x.to(DEVICE, dtype), base.to(DEVICE, dtype)
    routed = routed_tiles(tables_of(world, segments, 2, 16), ids, experts_of(world))
    output = computed(world, shape, routed, x, base.clone(), rows_per_input)
    adapters = row_adapters(segments) + [-1] * 2
    num_changed = 0
    for route, expert in enumerate(ids.flatten().tolist()):
        adapter = adapters[route // TOP_K]
        if adapter < 0 or not 0 <= expert < NUM_EXPERTS or lacks(adapter, shape.name):
            assert torch.equal(output[route], base[route]), "a route without weights changed"
            continue
        delta = dense(world, shape, x[route // rows_per_input], adapter, expert)
        expected = base[route].float() + delta
        torch.testing.assert_close(output[route].float(), expected, **TOLERANCES[dtype])
        num_changed += 1
    assert num_changed > 10


def test_lora_on_experts_is_the_same_bit_by_bit_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result does not depend on the size of its batch."""
    world = make_world(SHAPES, [8, 24])
    segments, ids = [(0, 9), (1, 4)], random_ids(13)
    x = torch.randn(13, GATE_UP.in_features, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tables = tables_of(world, segments, 0, 16)
    outputs = []
    for way in ("single", "grouped"):
        use(way, monkeypatch)
        routed = routed_tiles(tables, ids, experts_of(world))
        output = torch.zeros(13 * TOP_K, sum(GATE_UP.out_features), device=DEVICE)
        outputs.append(computed(world, GATE_UP, routed, x, output, TOP_K))
    assert torch.equal(*outputs)
