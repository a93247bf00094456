"""What is particular to ``lora_shrink``: its launches, its splits, what it refuses."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import ShrinkConfig, lora_shrink
from tests.harness.kernel_cases import OUT, QKV, SHAPES, lacks
from tests.harness.kernel_checks import SHRINK, check_shrink
from tests.harness.kernel_world import DEVICE, make_world


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
def test_lora_shrink_equals_the_reference_for_every_launch_config(
    config: ShrinkConfig, tile_rows: int
) -> None:
    world = make_world(SHAPES, [8, 24, 40], lacks=lacks)
    segments = [(0, 20), (-1, 1), (1, 3), (2, 17)]
    check_shrink(world, QKV, segments, config=config, tile_rows=tile_rows)


def test_lora_shrink_splits_do_not_depend_on_batch_neighbours() -> None:
    """Bit by bit: a row's result is that of the row alone."""
    world = make_world(SHAPES, [8, 24, 40])
    together = check_shrink(world, QKV, [(0, 1), (1, 1), (2, 1)], spare_rows=0)
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
            config=SHRINK,
        )
        assert torch.equal(alone[0, 0], together[0, i, : 3 * world.ranks[i]])


def test_lora_shrink_accepts_rows_of_a_wider_tensor() -> None:
    """Rows may lie apart."""
    world = make_world([OUT], [8])
    wide = torch.randn(4, 200, device=DEVICE)
    arguments = {
        "width": 8,
        "num_tiles": 1,
        "config": SHRINK,
    }
    tables = world.batch_tables([(0, 4)], 16)
    plane, module = world.planes.plane(0, 0), world.modules["o_proj"]
    apart = lora_shrink(wide[:, :128], plane, tables, module, **arguments)
    adjacent = lora_shrink(wide[:, :128].contiguous(), plane, tables, module, **arguments)
    assert torch.equal(apart, adjacent)


@pytest.mark.parametrize("rows_per_input", [1, 2, 3, 8])
def test_lora_shrink_computes_several_rows_from_one_input_row(rows_per_input: int) -> None:
    """Bit by bit as if the input row were there so many times."""
    world = make_world(SHAPES, [8, 24])
    generator = torch.Generator().manual_seed(rows_per_input)
    x = torch.randn(6, QKV.in_features, generator=generator).to(DEVICE)
    num_rows = 6 * rows_per_input
    tables = world.batch_tables([(0, 5), (1, num_rows - 5)], 16)
    results = [
        lora_shrink(
            rows,
            world.planes.plane(0, 0),
            tables,
            world.modules["qkv_proj"],
            width=80,
            num_tiles=tables.num_tiles,
            config=SHRINK,
            rows_per_input=shared,
            out=torch.zeros(1, num_rows, 80, device=DEVICE),
        )
        for rows, shared in ((x, rows_per_input), (x.repeat_interleave(rows_per_input, 0), 1))
    ]
    assert results[0].any() and torch.equal(*results)


def test_lora_shrink_refuses_wrong_sizes() -> None:
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
            config=SHRINK,
        )
    with pytest.raises(AssertionError):
        lora_shrink(
            torch.zeros(4, 128, device=DEVICE).half(),
            plane,
            tables,
            module,
            width=8,
            num_tiles=1,
            config=SHRINK,
        )
