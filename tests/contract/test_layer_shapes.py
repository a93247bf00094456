"""Modules whose shape differs between layers: their names, and the references of their layers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import ModuleShape, WeightRef

CPU = torch.device("cpu")


def pool_and_layers(widths: list[int | None]) -> tuple[Any, list[dict[str, Any]]]:
    """A pool without memory over layers whose ``mlp.down_proj`` has these input widths (None: the
    layer has none), and the layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora.lora_pool import PagedLoRAPool
    pool = object.__new__(PagedLoRAPool)
    pool.num_layer, pool.target_modules = len(widths), {"o_proj", "down_proj"}
    sides: dict[str, list[Any]] = {"o_proj": [32] * len(widths), "down_proj": widths}
    pool.A_buffer, pool.B_buffer = (
        {
            name: [WeightRef(i, name, (1, 8, width or 1), CPU) for i, width in enumerate(inputs)]
            for name, inputs in sides.items()
        }
        for _ in "AB"
    )
    layers = [
        {
            f"model.layers.{i}.{path}": SimpleNamespace(lora_offsets=[0, 64])
            for path, width in (("self_attn.o_proj", 32), ("mlp.down_proj", width))
            if width
        }
        for i, width in enumerate(widths)
    ]
    return pool, layers


def test_module_with_one_shape_keeps_its_name() -> None:
    pool, layers = pool_and_layers([48, 48])
    assert pool.module_shapes(layers) == (
        ModuleShape("down_proj", 48, (64,)),
        ModuleShape("o_proj", 32, (64,)),
    )
    before = {name: list(refs) for name, refs in pool.A_buffer.items()}
    pool.name_by_shape(pool.module_shapes(layers))
    assert pool.A_buffer == before


def test_module_of_some_layers_comes_after_those_of_all() -> None:
    pool, layers = pool_and_layers([None, 48, 48])
    assert pool.module_shapes(layers) == (
        ModuleShape("o_proj", 32, (64,)),
        ModuleShape("down_proj", 48, (64,), layers=frozenset({1, 2})),
    )


def test_each_shape_of_a_module_has_a_name_that_its_layers_use() -> None:
    pool, layers = pool_and_layers([96, 48, None, 48])
    shapes = pool.module_shapes(layers)
    assert shapes == (
        ModuleShape("o_proj", 32, (64,)),
        ModuleShape("down_proj@0", 96, (64,), layers=frozenset({0})),
        ModuleShape("down_proj@1", 48, (64,), layers=frozenset({1, 3})),
    )
    pool.name_by_shape(shapes)
    for buffer in (pool.A_buffer, pool.B_buffer):
        names = [ref.module for ref in buffer["down_proj"]]
        assert names == ["down_proj@0", "down_proj@1", "down_proj", "down_proj@1"]
        assert {ref.module for ref in buffer["o_proj"]} == {"o_proj"}


def test_module_with_many_shapes_is_refused() -> None:
    pool, layers = pool_and_layers([16, 32, 48, 64, 80])
    with pytest.raises(ValueError, match="down_proj has 5: leave it out of --lora-target-modules"):
        pool.module_shapes(layers)


def test_weights_for_a_module_that_a_layer_lacks_are_refused() -> None:
    """SGLang leaves them out without a word."""
    pool, layers = pool_and_layers([96, None, 48])
    shapes = pool.module_shapes(layers)
    everywhere = {(layer, "o_proj") for layer in range(3)}
    from sglang_elora.srt.lora.lora_pool import layout_of

    sizes = {"num_layers": 3, "num_planes": 2}
    layout = layout_of(8, everywhere | {(2, "down_proj")}, shapes, **sizes)
    assert set(layout.places) == {"o_proj", "down_proj@0", "down_proj@1"}
    for layer, module in ((1, "down_proj"), (3, "o_proj"), (0, "gate_up_proj")):
        with pytest.raises(ValueError, match=rf"{module} \(layer {layer}\), which this server"):
            layout_of(8, everywhere | {(layer, module)}, shapes, **sizes)
