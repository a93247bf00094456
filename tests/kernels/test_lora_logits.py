"""``lora_logits`` equals its reference: parts of B are read from their layers in one launch."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import ExpandConfig, lora_logits
from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import MIXES, POOLS, QKV, RANKS
from tests.harness.kernel_checks import EXPAND, check_logits
from tests.harness.kernel_world import DEVICE, ORDERS, make_world

PART = 128
OUTPUT_LAYER = ModuleShape("lm_head", 96, (PART,))
SHAPES = (QKV, OUTPUT_LAYER)
VOCABULARIES = (3 * PART, 2 * PART + 1, PART - 50)
"""Of three layers: all parts are full; the last has one token; only the first has tokens."""


def lacks(adapter: int, name: str) -> bool:
    """Every third adapter has no weights for the output layer."""
    return adapter % 3 == 2 and name == "lm_head"


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("mix", MIXES)
def test_lora_logits_equal_the_reference_for_mixed_batches(mix: str, vocab_size: int) -> None:
    ranks, segments = MIXES[mix]
    world = make_world(SHAPES, ranks, num_layers=3, lacks=lacks)
    check_logits(world, OUTPUT_LAYER, segments, vocab_size=vocab_size)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    "config",
    [
        ExpandConfig(16, 16, 256, 4, 2),
        ExpandConfig(256, 32, 256, 4, 2),  # wider than a part
        ExpandConfig(64, 64, 2, 4, 2),  # programs of several tiles
    ],
    ids=str,
)
def test_lora_logits_equal_the_reference_for_every_launch_config(
    config: ExpandConfig, tile_rows: int
) -> None:
    world = make_world(SHAPES, [8, 24, 40], num_layers=3, lacks=lacks)
    segments = [(0, 20), (-1, 1), (1, 3), (2, 17)]
    for vocab_size in VOCABULARIES:
        check_logits(
            world,
            OUTPUT_LAYER,
            segments,
            vocab_size=vocab_size,
            config=config,
            tile_rows=tile_rows,
            num_splits=2,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_lora_logits_equal_the_reference_for_each_dtype_and_slot_order(
    order: str, dtype: torch.dtype
) -> None:
    world = make_world(SHAPES, RANKS, dtype=dtype, order=order, num_layers=4)
    segments = [(i, 2) for i in range(len(RANKS))]
    check_logits(world, OUTPUT_LAYER, segments, vocab_size=3 * PART + 40)


@pytest.mark.parametrize(("kv_dtype", "kv_dim"), POOLS)
@pytest.mark.parametrize("num_planes", [1, 2])
def test_lora_logits_equal_the_reference_for_each_kv_pool_layout(
    num_planes: int, kv_dtype: torch.dtype, kv_dim: int
) -> None:
    world = make_world(
        SHAPES,
        [3, 16, 256],
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
        kv_dim=kv_dim,
        num_planes=num_planes,
        num_layers=3,
    )
    check_logits(world, OUTPUT_LAYER, [(1, 2), (0, 1), (2, 3)], vocab_size=2 * PART + 9)


def test_lora_logits_accept_an_empty_batch() -> None:
    world = make_world([OUTPUT_LAYER], [8], num_layers=2)
    check_logits(world, OUTPUT_LAYER, [], vocab_size=2 * PART, spare_rows=0)


def test_lora_logits_refuse_a_vocabulary_larger_than_its_parts() -> None:
    world = make_world([OUTPUT_LAYER], [8], num_layers=2)
    tables = world.batch_tables([(0, 1)], 16)
    with pytest.raises(AssertionError, match="3, 2"):
        lora_logits(
            torch.zeros(1, 1, 8, device=DEVICE),
            world.planes.pool_planes,
            tables,
            world.modules["lm_head"],
            torch.zeros(1, 3 * PART, device=DEVICE),
            vocab_size=2 * PART + 1,
            num_tiles=1,
            config=EXPAND,
        )
