"""Modules whose shape differs between layers: their names, and the references of their layers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import ModuleShape, WeightRef

CPU = torch.device("cpu")


def pool_over(widths: list[int | None]) -> Any:
    """A pool without memory over layers whose ``mlp.down_proj`` has these input widths (None: the
    layer has none)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora.lora_pool import PagedLoRAPool
    pool = object.__new__(PagedLoRAPool)
    pool.num_layer, pool.target_modules = len(widths), {"o_proj", "down_proj"}
    sides: dict[str, list[Any]] = {"o_proj": [32] * len(widths), "down_proj": widths}
    pool.A_buffer, pool.B_buffer = (
        {
            name: [WeightRef(i, name, (1, 8, width or 0), CPU) for i, width in enumerate(inputs)]
            for name, inputs in sides.items()
        }
        for _ in "AB"
    )
    pool.modules = [
        {
            f"model.layers.{i}.{path}": SimpleNamespace(lora_offsets=[0, 64])
            for path, width in (("self_attn.o_proj", 32), ("mlp.down_proj", width))
            if width
        }
        for i, width in enumerate(widths)
    ]
    return pool


def planned(widths: list[int | None], pool_layers: int | None = None) -> Any:
    """As ``pool_over``, with its plan."""
    pool = pool_over(widths)
    pool.set_model(None, None, pool_layers=pool_layers or len(widths))
    return pool


def test_module_with_one_shape_keeps_its_name() -> None:
    before, pool = pool_over([48, 48]), planned([48, 48])
    assert pool.plan.shapes == (
        ModuleShape("down_proj", 48, (64,)),
        ModuleShape("o_proj", 32, (64,)),
    )
    assert (pool.A_buffer, pool.B_buffer) == (before.A_buffer, before.B_buffer)


def test_module_of_some_layers_comes_after_those_of_all() -> None:
    assert planned([None, 48, 48]).plan.shapes == (
        ModuleShape("o_proj", 32, (64,)),
        ModuleShape("down_proj", 48, (64,), layers=frozenset({1, 2})),
    )


def test_each_shape_of_a_module_has_a_name_that_its_layers_use() -> None:
    pool = planned([96, 48, None, 48])
    assert pool.plan.shapes == (
        ModuleShape("o_proj", 32, (64,)),
        ModuleShape("down_proj@0", 96, (64,), layers=frozenset({0})),
        ModuleShape("down_proj@1", 48, (64,), layers=frozenset({1, 3})),
    )
    for buffer in (pool.A_buffer, pool.B_buffer):
        names = [ref.module for ref in buffer["down_proj"]]
        assert names == ["down_proj@0", "down_proj@1", "down_proj", "down_proj@1"]
        assert {ref.module for ref in buffer["o_proj"]} == {"o_proj"}


def test_references_name_the_layer_of_the_pool_that_holds_the_weights() -> None:
    pool = planned([48, 48, 48, 48], pool_layers=2)
    for buffer in (pool.A_buffer, pool.B_buffer):
        for module, refs in buffer.items():
            places = [(ref.layer, ref.module) for ref in refs]
            assert places == [(i // 2, f"{module}@{i % 2}") for i in range(4)]


def test_module_with_many_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="down_proj has 5: leave it out of --lora-target-modules"):
        planned([16, 32, 48, 64, 80])


@pytest.mark.parametrize("pool_layers", [3, 1])
def test_weights_for_a_module_that_a_layer_lacks_are_refused(pool_layers: int) -> None:
    """SGLang leaves them out without a word."""
    plan = planned([96, None, 48], pool_layers).plan
    everywhere: set[tuple[int | None, str]] = {(layer, "o_proj") for layer in range(3)}
    shapes = plan.shapes_of(everywhere | {(2, "down_proj")})
    assert [shape.in_features for shape in shapes if shape.module == "down_proj"] == [48]
    for layer, module in ((1, "down_proj"), (3, "o_proj"), (0, "gate_up_proj"), (None, "lm_head")):
        with pytest.raises(ValueError, match=rf"{module} \(layer {layer}\), which this server"):
            plan.shapes_of(everywhere | {(layer, module)})
