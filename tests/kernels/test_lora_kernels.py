"""Both LoRA kernels equal the reference on each case of ``kernel_cases.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_elora.pages import ModuleShape
from tests.harness.kernel_cases import GATE_UP, MIXES, OUT, POOLS, QKV, RANKS, SHAPES, lacks
from tests.harness.kernel_checks import check_expand, check_shrink
from tests.harness.kernel_world import ORDERS, make_world

Check = Callable[..., Any]
CHECKS = {"expand": check_expand, "shrink": check_shrink}
EACH_KERNEL = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("mix", MIXES)
@EACH_KERNEL
def test_lora_kernels_equal_the_reference_for_mixed_batches(
    check: Check, mix: str, shape: ModuleShape
) -> None:
    ranks, segments = MIXES[mix]
    check(make_world(SHAPES, ranks, lacks=lacks), shape, segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
@EACH_KERNEL
def test_lora_kernels_equal_the_reference_for_each_dtype_and_slot_order(
    check: Check, order: str, dtype: torch.dtype
) -> None:
    world = make_world(SHAPES, RANKS, dtype=dtype, order=order, lacks=lacks)
    check(world, QKV, [(i, 2) for i in range(len(RANKS))])


@pytest.mark.parametrize("rank", [*RANKS, 256])
@EACH_KERNEL
def test_lora_kernels_equal_the_reference_for_each_rank(check: Check, rank: int) -> None:
    check(make_world([OUT], [rank], dtype=torch.bfloat16), OUT, [(0, 3)])


@pytest.mark.parametrize(("kv_dtype", "kv_dim"), POOLS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@EACH_KERNEL
def test_lora_kernels_equal_the_reference_for_each_kv_pool_layout(
    check: Check, kv_dtype: torch.dtype, kv_dim: int, page_size: int
) -> None:
    world = make_world(
        SHAPES, [3, 16], dtype=torch.bfloat16, kv_dtype=kv_dtype, kv_dim=kv_dim, page_size=page_size
    )
    check(world, GATE_UP, [(1, 2), (0, 1)])


@EACH_KERNEL
def test_lora_kernels_equal_the_reference_with_a_and_b_in_one_plane(check: Check) -> None:
    """B follows A in the same plane."""
    check(make_world(SHAPES, [8, 24], num_planes=1), OUT, [(1, 2), (0, 1)])


@EACH_KERNEL
def test_lora_kernels_accept_an_empty_batch(check: Check) -> None:
    check(make_world([OUT], [8]), OUT, [], spare_rows=0)
