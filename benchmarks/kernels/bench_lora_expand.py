"""``lora_expand`` with adapters in scattered and in contiguous slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.world import CaseWorld, Ours
from sglang_elora.pages import ModuleShape


def works(world: CaseWorld, shape: ModuleShape) -> dict[str, Callable[[], object]]:
    """Each computes the module once per layer of the world."""
    x, output = world.inputs(shape)

    def over(ours: Ours) -> Callable[[], object]:
        inner = ours.shrink(0, x)

        def work() -> torch.Tensor:
            for layer in range(world.num_layers):
                ours.expand(layer, inner, output)
            return output

        return work

    return {
        "expand/scattered": over(Ours(world, shape, world.scattered)),
        "expand/contiguous": over(Ours(world, shape, world.contiguous)),
    }
