"""``lora_shrink`` followed by ``lora_expand``, and SGLang's kernels on padded buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.rivals import RIVALS
from benchmarks.kernels.world import CaseWorld, Ours, expected
from sglang_elora.pages import ModuleShape
from tests.harness.tolerances import TOLERANCES

TOLERANCE = TOLERANCES[torch.bfloat16]


def competitors(world: CaseWorld, shape: ModuleShape, rivals: bool) -> dict[str, Any]:
    """Objects with ``both(layer, x, output)``."""
    result: dict[str, Any] = {
        "both/scattered": Ours(world, shape, world.scattered),
        "both/contiguous": Ours(world, shape, world.contiguous),
    }
    if rivals:
        result |= {f"both/{name}": build(world, shape) for name, build in RIVALS.items()}
    return result


def works(
    world: CaseWorld, shape: ModuleShape, rivals: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The work to time, and the error of each competitor's result.

    Returns:
        Work that computes the module once per layer, and per competitor the share of elements of
        layer 0 that differ from float32 by more than the tolerance.
    """
    x, base = world.inputs(shape)
    truth = expected(world, shape, 0, x, base)
    todo, wrong = {}, {}
    for name, competitor in competitors(world, shape, rivals).items():
        result = competitor.both(0, x, base.clone()).float()
        if name != "both/contiguous":  # other weights
            close = torch.isclose(result, truth, **TOLERANCE)
            wrong[name] = float((~close).float().mean())
        todo[name] = _over(competitor, world.num_layers, x, base.clone())
    return todo, wrong


def _over(competitor: Any, num_layers: int, x: Any, output: Any) -> Callable[[], object]:
    def work() -> torch.Tensor:
        for layer in range(num_layers):
            competitor.both(layer, x, output)
        return output

    return work
