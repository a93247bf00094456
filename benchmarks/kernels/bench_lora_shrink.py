"""``lora_shrink`` with adapters in scattered and in contiguous slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.world import CaseWorld, Ours
from sglang_elora.pages import ModuleShape


def works(world: CaseWorld, shape: ModuleShape) -> dict[str, Callable[[], object]]:
    """Each computes the module once per layer of the world."""
    x, _ = world.inputs(shape)

    def over(ours: Ours) -> Callable[[], object]:
        def work() -> torch.Tensor:
            for layer in range(world.num_layers):
                inner = ours.shrink(layer, x)
            return inner

        return work

    return {
        "shrink/scattered": over(Ours(world, shape, world.scattered)),
        "shrink/contiguous": over(Ours(world, shape, world.contiguous)),
    }
