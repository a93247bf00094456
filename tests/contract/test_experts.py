"""LoRA on experts, each row with its own adapter and experts, against plain torch.

Through ``elora_torch`` and ``elora_triton``, whose kernels run under Triton's interpreter.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    WeightRef,
)
from tests.harness.kv_pools import pool_of
from tests.harness.tolerances import TOLERANCES

HIDDEN, INNER, NUM_EXPERTS, NUM_CHOICES, SCALING = 96, 40, 5, 2, 0.5
GATE_UP = ModuleShape("gate_up_proj_moe", HIDDEN, (INNER, INNER), NUM_EXPERTS)
DOWN = ModuleShape("down_proj_moe", INNER, (HIDDEN,), NUM_EXPERTS)
SHAPES = (DOWN, GATE_UP, ModuleShape("o_proj", HIDDEN, (HIDDEN,)))
CPU = torch.device("cpu")


class World:
    """Adapters in scattered slots. The third lacks ``gate_up_proj_moe``, the fourth both."""

    def __init__(self, ranks: Sequence[int], dtype: torch.dtype, num_planes: int) -> None:
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        planes = [[torch.zeros(9000, 2, 32, dtype=dtype)] for _ in range(num_planes)]
        self.pool = pool_of(planes)
        self.dtype, self.paged = dtype, list[PagedAdapter]()
        self.weights: list[dict[str, torch.Tensor]] = []  # SCALING * B @ A of each expert
        pool, numbers = KVPlanes(tuple(planes), dtype), rng.sample(range(1, 9000), 8999)
        for i, rank in enumerate(ranks):
            lacked = {2: {GATE_UP.name}, 3: {GATE_UP.name, DOWN.name}}.get(i, set())
            shapes = [shape for shape in SHAPES if shape.name not in lacked]
            made, weights = {}, {}
            for shape in shapes:
                parts, out = len(shape.out_features), shape.out_features[0]
                size = shape.num_experts, parts
                a = torch.randn(*size, rank, shape.in_features, generator=generator).to(dtype)
                b = (torch.randn(*size, out, rank, generator=generator) / rank).to(dtype)
                made[shape.name] = a.view(-1, shape.in_features), b.view(-1, rank)
                weights[shape.name] = SCALING * (b.float() @ a.float()).flatten(1, 2)
            layout = AdapterLayout.build(rank, shapes, num_planes)
            image = AdapterImage.build(layout, 1, lambda _, n, m=made: m[n], dtype, SCALING)
            slots = [numbers.pop() for _ in range(layout.num_slots(pool.slot_elems, 1))]
            table = SlotTable(torch.tensor(slots))
            pool.write(table, image)
            self.paged.append(PagedAdapter(layout, table, pool, SCALING))
            self.weights.append(weights)

    def product(
        self, name: str, i: int | None, expert: int, x: torch.Tensor
    ) -> torch.Tensor | float:
        """What LoRA adds to one row's product with one expert."""
        if i is None or expert < 0 or name not in self.weights[i]:
            return 0.0
        return self.weights[i][name][expert] @ x.float()


def runner_of(*, is_triton: bool) -> Any:
    return SimpleNamespace(runner_backend=SimpleNamespace(is_triton=lambda: is_triton))


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
        from sglang_elora.srt.lora.triton_backend import EloraTritonBackend
    return {"elora_torch": EloraTorchBackend, "elora_triton": EloraTritonBackend}


def backend_over(world: World, cls: Any) -> Any:
    arguments = SimpleNamespace(enable_deterministic_inference=False)
    backend = cls(1, CPU, max_adapters=64, server_args=arguments)
    backend.set_model(SHAPES, world.dtype, max_rank=64, tp_size=1)
    return backend


@pytest.mark.parametrize(
    ("rows_each", "num_planes", "dtype"),
    [
        *product([1], [1, 2], TOLERANCES),  # few routes
        *product([120], [2], [torch.float32, torch.bfloat16]),  # more than have a tile each
    ],
)
@pytest.mark.parametrize("name", ["elora_torch", "elora_triton"])
def test_each_row_gets_the_products_of_its_adapter_and_its_experts(
    name: str, rows_each: int, num_planes: int, dtype: torch.dtype, classes: dict[str, Any]
) -> None:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    world = World([8, 3, 16, 4, 5], dtype, num_planes)
    backend = backend_over(world, classes[name])
    owners = [0, None, 1, 2, 3, 0, 4]
    backend.set_batch([(None if i is None else world.paged[i], rows_each) for i in owners], None)
    generator = torch.Generator().manual_seed(1)
    num_rows = len(owners) * rows_each + 2  # with padding
    topk_ids = torch.stack(
        [torch.randperm(NUM_EXPERTS, generator=generator)[:NUM_CHOICES] for _ in range(num_rows)]
    ).to(torch.int32)
    topk_ids[0, 1] = topk_ids[-3, 0] = -1  # experts of another rank
    x = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    inner = torch.randn(num_rows, NUM_CHOICES, INNER, generator=generator).to(dtype)
    factors = torch.rand(num_rows, NUM_CHOICES, generator=generator)
    gate_up = torch.randn(num_rows, NUM_CHOICES, 2 * INNER, generator=generator).to(dtype)
    down = torch.randn(num_rows, NUM_CHOICES, HIDDEN, generator=generator).to(dtype)
    expected = gate_up.float(), down.float()
    for row in range(num_rows):
        for j, expert in enumerate(topk_ids[row].tolist()):
            i = (*owners, None, None)[row // rows_each]  # the rows of the batch, and padding
            expected[0][row, j] += world.product(GATE_UP.name, i, expert, x[row])
            product = world.product(DOWN.name, i, expert, inner[row, j])
            expected[1][row, j] += product * factors[row, j]
    context = ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=world.pool))
    with forward_context(context):
        routes = backend.routes(topk_ids)
        gate_up_ref, down_ref = (WeightRef(0, s.name, (), CPU) for s in (GATE_UP, DOWN))
        backend.add_to_routes(x, gate_up_ref, gate_up.flatten(0, 1), routes)
        backend.add_to_routes(
            inner.flatten(0, 1), down_ref, down.flatten(0, 1), routes, factors.flatten()
        )
    for found, wanted in zip((gate_up, down), expected, strict=True):
        torch.testing.assert_close(found.float(), wanted, **TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["elora_torch", "elora_triton"])
def test_only_batches_with_an_adapter_of_experts_adapt_them(
    name: str, classes: dict[str, Any]
) -> None:
    world = World([8, 8, 8, 8], torch.float32, 2)
    backend = backend_over(world, classes[name])
    for i, adapted in enumerate([(True, True), (True, True), (False, True), (False, False)]):
        backend.set_batch([(world.paged[i], 2), (None, 1)], None)
        assert (backend.adapts(GATE_UP.name), backend.adapts(DOWN.name)) == adapted
    backend.set_batch([(None, 3)], None)
    assert not backend.adapts(GATE_UP.name)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_experts_of_the_cpu_platform_compute_what_sglang_computes(activation: str) -> None:
    """Also if hooks change both products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe import MoeRunnerConfig
        from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        from sglang_elora.platforms.experts import CpuExperts
    generator = torch.Generator().manual_seed(0)
    config = MoeRunnerConfig(num_experts=NUM_EXPERTS, activation=activation)
    sizes = {"w13_weight": (2 * INNER, HIDDEN), "w2_weight": (HIDDEN, INNER)}
    weights = {
        name: torch.randn(NUM_EXPERTS, *size, generator=generator) for name, size in sizes.items()
    }
    layer = SimpleNamespace(num_experts=NUM_EXPERTS, **weights)
    x, logits = (torch.randn(7, n, generator=generator) for n in (HIDDEN, NUM_EXPERTS))
    factors, ids = logits.softmax(-1).topk(NUM_CHOICES)
    chosen = StandardTopKOutput(factors, ids.to(torch.int32), logits)
    runner = CpuExperts(config)
    dispatched = SimpleNamespace(hidden_states=x, topk_output=chosen)
    (output,) = runner.run_from_dispatch(dispatched, layer, config)
    torch.testing.assert_close(output, moe_forward_native(layer, x, chosen, config))

    # The same change of all experts' weights, by hooks.
    change = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    hooks = SimpleNamespace(
        after_gate_up=lambda x, y, *_: y.add_((x @ change["w13_weight"].T)[:, None]),
        after_down=lambda x, y, f, _: y.add_((x @ change["w2_weight"].T).view_as(y) * f[..., None]),
    )
    (output,) = runner.run_from_dispatch(dispatched, layer, config, hooks=hooks)
    changed = SimpleNamespace(
        num_experts=NUM_EXPERTS, **{name: weights[name] + change[name] for name in sizes}
    )
    wanted = moe_forward_native(changed, x, chosen, config)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "layer", "reason"),
    [
        ({}, {}, None),
        ({}, {"runner": None}, "their runner"),
        ({}, {"runner": runner_of(is_triton=False)}, "their runner"),
        ({"is_gated": False}, {}, "splits gate and up"),
        ({"gemm1_alpha": 1.7}, {}, "splits gate and up"),
        ({"activation": "relu2"}, {}, "their activation is relu2"),
        ({"apply_router_weight_on_input": True}, {}, "scaled by the router"),
        ({}, {"num_fused_shared_experts": 1}, "--disable-shared-experts-fusion"),
        ({}, {"moe_ep_size": 2}, "expert parallelism"),
    ],
)
def test_layers_of_experts_that_are_not_served_have_a_reason(
    config: dict[str, Any], layer: dict[str, Any], reason: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.moe import MoeRunnerConfig

        from sglang_elora.srt.lora.experts import why_not_served
    plain = {"runner": runner_of(is_triton=True), "num_fused_shared_experts": 0, "moe_ep_size": 1}
    made: Any = SimpleNamespace(moe_runner_config=MoeRunnerConfig(**config), **{**plain, **layer})
    found = why_not_served(made)
    assert found is None if reason is None else reason in str(found)
