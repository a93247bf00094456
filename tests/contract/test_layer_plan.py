"""LoRA of a model with more layers than its KV pool, against plain torch.

Through ``elora_torch`` and ``elora_triton``, whose kernels run under Triton's interpreter.
"""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    LayerPlan,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    WeightRef,
)
from tests.harness.kv_pools import pool_of
from tests.harness.tolerances import TOLERANCES

FOUND = {
    ModuleShape("qkv_proj", 96, (64, 32, 32)): [1, 4],
    ModuleShape("in_proj", 96, (160,)): [0, 2, 3],
    ModuleShape("down_proj", 200, (96,)): [0, 1, 2, 3, 4],
}
SCALING, CPU = 0.5, torch.device("cpu")


class World:
    """Adapters of a model of five layers in scattered slots of a pool of two. The third has weights
    for ``in_proj`` of the layers 2 and 3 only."""

    def __init__(self, ranks: list[int], num_planes: int) -> None:
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        planes = [[torch.zeros(3000, 2, 32) for _ in range(2)] for _ in range(num_planes)]
        self.pool = pool_of(planes)
        self.plan = plan = LayerPlan.build(FOUND, (), model_layers=5, pool_layers=2)
        self.paged: list[PagedAdapter] = []
        self.products: list[dict[tuple[int, str], torch.Tensor]] = []  # SCALING * B @ A
        pool, numbers = KVPlanes(tuple(planes), torch.float32), rng.sample(range(1, 3000), 2999)
        for i, rank in enumerate(ranks):
            has = {
                (layer, shape.name): shape
                for shape, layers in FOUND.items()
                for layer in layers
                if i != 2 or (shape.name == "in_proj" and layer >= 2)
            }
            a, b = {}, {}
            for key, shape in has.items():
                parts = len(shape.out_features)
                a[key] = torch.randn(parts * rank, shape.in_features, generator=generator)
                b[key] = torch.randn(sum(shape.out_features), rank, generator=generator) / rank
            layout = AdapterLayout.build(rank, plan.shapes_of(set(has)), num_planes)

            def matrices(
                layer: int, name: str, a: Any = a, b: Any = b, rank: int = rank
            ) -> tuple[torch.Tensor, torch.Tensor]:
                module = name.partition("@")[0]
                key = plan.layer_of_model(layer, name), module
                (shape,) = (s for s in FOUND if s.name == module)
                rows = len(shape.out_features) * rank
                zeros = torch.zeros(rows, shape.in_features), torch.zeros(160, rank)
                return (a[key], b[key]) if key in a else (zeros[0], zeros[1])

            image = AdapterImage.build(layout, 2, matrices, torch.float32, SCALING)
            slots = [numbers.pop() for _ in range(layout.num_slots(pool.slot_elems, 1))]
            table = SlotTable(torch.tensor(slots))
            pool.write(table, image)
            self.paged.append(PagedAdapter(layout, table, pool, SCALING))
            self.products.append(
                {
                    key: SCALING
                    * torch.cat(
                        [
                            own_b @ own_a
                            for own_a, own_b in zip(
                                a[key].split(rank), b[key].split(shape.out_features), strict=True
                            )
                        ]
                    )
                    for key, shape in has.items()
                }
            )


@pytest.mark.parametrize("num_planes", [1, 2])
@pytest.mark.parametrize("name", ["elora_torch", "elora_triton"])
def test_each_layer_of_the_model_gets_its_own_weights(name: str, num_planes: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
        from sglang_elora.srt.lora.triton_backend import EloraTritonBackend
    cls: Any = {"elora_torch": EloraTorchBackend, "elora_triton": EloraTritonBackend}[name]
    world = World([8, 3, 5], num_planes)
    arguments = SimpleNamespace(enable_deterministic_inference=False)
    backend = cls(1, CPU, max_adapters=8, server_args=arguments)
    backend.set_model(world.plan.shapes, torch.float32, max_rank=16, tp_size=1)
    owners = [0, None, 2, 1]
    backend.set_batch([(None if i is None else world.paged[i], 3) for i in owners], None)
    context = ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=world.pool))
    generator = torch.Generator().manual_seed(1)
    assert any(shape.swaps_planes for shape in world.plan.shapes)
    with forward_context(context):
        for shape, layers in FOUND.items():
            for layer in layers:
                x = torch.randn(12, shape.in_features, generator=generator)
                output = torch.randn(12, sum(shape.out_features), generator=generator)
                wanted = output.clone()
                for i, owner in enumerate(owners):
                    product = {} if owner is None else world.products[owner]
                    if (layer, shape.name) in product:
                        rows = slice(3 * i, 3 * i + 3)
                        wanted[rows] += x[rows] @ product[layer, shape.name].T
                place = world.plan.places[layer, shape.name]
                ref = WeightRef(place.layer, place.name, (), CPU)
                found = backend.run_qkv_lora(x, ref, ref, base_output=output)
                torch.testing.assert_close(found, wanted, **TOLERANCES[torch.float32])
