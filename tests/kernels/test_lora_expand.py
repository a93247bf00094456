"""What is particular to ``lora_expand``: its launches, its rounding, what it refuses."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import ExpandConfig, lora_expand
from tests.harness.kernel_cases import OUT, QKV, SHAPES, lacks
from tests.harness.kernel_checks import EXPAND, check_expand
from tests.harness.kernel_world import DEVICE, make_world


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
def test_lora_expand_equals_the_reference_for_every_launch_config(
    config: ExpandConfig, tile_rows: int, num_splits: int
) -> None:
    world = make_world(SHAPES, [8, 24, 40], lacks=lacks)
    segments = [(0, 20), (-1, 1), (1, 3), (2, 17)]
    check_expand(world, QKV, segments, config=config, tile_rows=tile_rows, num_splits=num_splits)


def test_lora_expand_rounds_the_split_sum_and_the_output_once_each() -> None:
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
        config=EXPAND,
    )
    assert torch.equal(output, torch.full_like(output, (torch.tensor(3 + 2**-7)).bfloat16()))


def test_lora_expand_refuses_wrong_sizes() -> None:
    world = make_world([OUT], [8])
    tables, module = world.batch_tables([(0, 4)], 16), world.modules["o_proj"]
    plane, inner = world.planes.plane(-1, 0), torch.zeros(1, 4, 8, device=DEVICE)
    wrong = (torch.zeros(4, 95), torch.zeros(3, 96), torch.zeros(4, 96).half())
    for output in (tensor.to(DEVICE) for tensor in wrong):
        with pytest.raises(AssertionError):
            lora_expand(inner, plane, tables, module, output, num_tiles=1, config=EXPAND)
