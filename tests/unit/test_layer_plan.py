"""Which layers of the pool hold the adapter weights of which layers of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from sglang_elora.pages import AdapterLayout, LayerPlan, ModuleShape

HIDDEN, INNER = 5120, 17408


def module(name: str, in_features: int, *outs: int, num_experts: int = 1) -> ModuleShape:
    return ModuleShape(name, in_features, outs, num_experts)


def qwen3_5(num_layers: int = 64) -> dict[ModuleShape, list[int]]:
    """Qwen3.5-27B: every fourth layer has attention, the others the gated delta rule."""
    every = list(range(num_layers))
    attention = every[3::4]
    linear = [layer for layer in every if layer not in attention]
    return {
        module("qkv_proj", HIDDEN, 2 * 24 * 256, 4 * 256, 4 * 256): attention,
        module("o_proj", 24 * 256, HIDDEN): attention,
        module("in_proj_qkvz", HIDDEN, 2048, 2048, 6144, 6144): linear,
        module("in_proj_ba", HIDDEN, 48, 48): linear,
        module("out_proj", 6144, HIDDEN): linear,
        module("gate_up_proj", HIDDEN, INNER, INNER): every,
        module("down_proj", INNER, HIDDEN): every,
    }


def nemotron_h() -> dict[ModuleShape, list[int]]:
    """Nemotron Nano 9B v2: 27 layers of Mamba 2, 25 of MLP, 4 of attention, irregularly."""
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    layers = {kind: [i for i, k in enumerate(pattern) if k == kind] for kind in "M-*"}
    return {
        module("in_proj", 4480, 22656): layers["M"],
        module("out_proj", 10240, 4480): layers["M"],
        module("up_proj", 4480, 15680): layers["-"],
        module("down_proj", 15680, 4480): layers["-"],
        module("qkv_proj", 4480, 5120, 1024, 1024): layers["*"],
        module("o_proj", 5120, 4480): layers["*"],
    }


def gpt_oss() -> dict[ModuleShape, list[int]]:
    """gpt-oss 20B: 24 layers of attention, every other one with a sliding window."""
    every = list(range(24))
    return {
        module("qkv_proj", 2880, 4096, 512, 512): every,
        module("o_proj", 4096, 2880): every,
    }


def planned(
    found: Mapping[ModuleShape, Sequence[int]], model_layers: int, pool_layers: int
) -> LayerPlan:
    return LayerPlan.build(found, (), model_layers=model_layers, pool_layers=pool_layers)


def excess(plan: LayerPlan, found: Mapping[ModuleShape, Sequence[int]], wanted: set[str]) -> float:
    """Bytes of an adapter of these modules over both planes, over those of its weights."""
    present = {(layer, s.name) for s, layers in found.items() for layer in layers}
    shapes = plan.shapes_of({(layer, name) for layer, name in present if name in wanted})
    elems = max(AdapterLayout.build(16, shapes).plane_elems) * 2 * plan.num_layers
    own = sum(
        16 * (s.a_elems + s.b_elems) * len(layers)
        for s, layers in found.items()
        if s.name in wanted
    )
    return elems / own


def test_a_layer_of_the_pool_holds_its_own_layer_if_all_have_kv() -> None:
    found = {module("o_proj", 64, 64): [0, 1, 2], module("down_proj", 128, 64): [1, 2]}
    plan = planned(found, 3, 3)
    assert [shape.name for shape in plan.shapes] == ["o_proj", "down_proj"]
    assert not any(shape.swaps_planes for shape in plan.shapes)
    for layer in range(3):
        assert plan.places[layer, "o_proj"] == (layer, "o_proj")
    assert (0, "down_proj") not in plan.places
    assert plan.layer_of_model(2, "down_proj") == 2


def test_layers_are_held_in_the_order_of_the_model() -> None:
    plan = planned(qwen3_5(), 64, 16)
    for (layer, _), place in plan.places.items():
        assert place.layer == layer // 4
        assert plan.layer_of_model(*place) == layer
    assert len({(place.layer, place.name) for place in plan.places.values()}) == len(plan.places)


@pytest.mark.parametrize("kind", ["M", "-"])
def test_kinds_that_do_not_divide_are_spread_by_at_most_one(kind: str) -> None:
    plan = planned(nemotron_h(), 56, 4)
    name = {"M": "in_proj", "-": "up_proj"}[kind]
    at = [place.layer for (_, own), place in sorted(plan.places.items()) if own == name]
    assert at == sorted(at)
    counts = Counter(at).values()
    assert max(counts) - min(counts) <= 1 and len(counts) == 4


@pytest.mark.parametrize(
    ("found", "pool_layers", "wanted", "most"),
    [
        (qwen3_5(), 16, {shape.name for shape in qwen3_5()}, 1.05),
        (qwen3_5(), 16, {"gate_up_proj", "down_proj"}, 1.05),
        (nemotron_h(), 4, {shape.name for shape in nemotron_h()}, 1.05),
        (nemotron_h(), 4, {"in_proj", "out_proj"}, 1.05),
        (gpt_oss(), 12, {"qkv_proj", "o_proj"}, 1.05),
        # 25 layers over 4: two of them hold one matrix more, which lies in one plane.
        (nemotron_h(), 4, {"up_proj", "down_proj"}, 1.09),
    ],
    ids=["Qwen3.5", "Qwen3.5, MLP", "Nemotron", "Nemotron, Mamba", "gpt-oss", "Nemotron, MLP"],
)
def test_an_adapter_takes_little_more_than_its_weights(
    found: dict[ModuleShape, list[int]], pool_layers: int, wanted: set[str], most: float
) -> None:
    num_layers = 1 + max(max(layers) for layers in found.values())
    plan = planned(found, num_layers, pool_layers)
    assert 1 <= excess(plan, found, wanted) <= most


def test_swapped_module_has_a_in_the_second_plane() -> None:
    plain = ModuleShape("up_proj", 64, (256,))
    swapped = ModuleShape("down_proj", 256, (64,), swaps_planes=True)
    layout = AdapterLayout.build(8, [plain, swapped])
    up, down = layout.places["up_proj"], layout.places["down_proj"]
    assert (up.a_plane, up.b_plane, down.a_plane, down.b_plane) == (0, 1, 1, 0)
    assert (up.a_offset, down.b_offsets) == (0, (8 * 64,))
    assert (up.b_offsets, down.a_offset) == ((0,), 8 * 256)
    assert layout.plane_elems == (8 * 128, 8 * 512)
    alone = AdapterLayout.build(8, [plain, swapped], num_planes=1)
    assert {place.a_plane for place in alone.places.values()} == {0}
    assert alone.plane_elems == (8 * 640,)
