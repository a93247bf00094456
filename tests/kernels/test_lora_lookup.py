"""``lora_lookup`` equals its reference: rows of A are read from the layer of each token's part."""

from __future__ import annotations

import pytest
import torch

from sglang_elora.kernels import lora_lookup
from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import MIXES, POOLS, QKV, RANKS
from tests.harness.kernel_checks import check_lookup
from tests.harness.kernel_world import ORDERS, make_world

EMBEDDING = ModuleShape("embed_tokens", 70, (96,))
SHAPES = (QKV, EMBEDDING)


def lacks(adapter: int, name: str) -> bool:
    """Every third adapter has no weights for the embedding."""
    return adapter % 3 == 2 and name == "embed_tokens"


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_lora_lookup_equals_the_reference_for_mixed_batches(mix: str, tile_rows: int) -> None:
    ranks, segments = MIXES[mix]
    world = make_world(SHAPES, ranks, num_layers=3, lacks=lacks)
    check_lookup(world, EMBEDDING, segments, tile_rows=tile_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_layers", [1, 4])
def test_lora_lookup_equals_the_reference_for_each_dtype_and_slot_order(
    num_layers: int, order: str, dtype: torch.dtype
) -> None:
    world = make_world(SHAPES, RANKS, dtype=dtype, order=order, num_layers=num_layers)
    check_lookup(world, EMBEDDING, [(i, 3) for i in range(len(RANKS))])


@pytest.mark.parametrize(("kv_dtype", "kv_dim"), POOLS)
@pytest.mark.parametrize("num_planes", [1, 2])
def test_lora_lookup_equals_the_reference_for_each_kv_pool_layout(
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
    check_lookup(world, EMBEDDING, [(1, 2), (0, 1), (2, 3)])


def test_lora_lookup_accepts_an_empty_batch() -> None:
    check_lookup(make_world([EMBEDDING], [8], num_layers=2), EMBEDDING, [], spare_rows=0)


def test_lora_lookup_refuses_a_vocabulary_larger_than_its_parts() -> None:
    world = make_world([EMBEDDING], [8], num_layers=2)
    tables = world.batch_tables([(0, 1)], 16)
    with pytest.raises(AssertionError, match="141, 140"):
        lora_lookup(
            torch.zeros(1, dtype=torch.int64, device=world.planes.device),
            world.planes.pool_planes,
            tables,
            world.modules["embed_tokens"],
            vocab_size=141,
            dtype=torch.float32,
            width=8,
            num_tiles=1,
        )
