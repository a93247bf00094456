"""Weights of MoE experts as they are served: the product of each expert is PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from sglang_elora.adapters import (
    AdapterError,
    BaseShapes,
    check_adapter,
    check_tensors,
    needs_one_rank,
    one_rank_config,
    one_rank_tensors,
    read_adapter,
    served_modules,
    why_not_stacked,
)
from tests.harness.peft_adapters import HIDDEN, LAYERS, RANK
from tests.unit.moe_adapters import (
    BOTH,
    EXPERTS,
    EXPERTS0,
    FAMILIES,
    INNER,
    deltas_as_served,
    deltas_of_peft,
    moe_config,
    moe_model,
    save_fused,
    save_single,
    stored,
)

FUSED_OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_parameters": BOTH[::-1]},
    {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]},
    {"target_parameters": ["gate_up_proj"]},
    {"target_parameters": ["experts.down_proj"], "use_rslora": True},
    {"target_parameters": ["layers.1.mlp.experts.down_proj", "gate_up_proj"]},
    {"rank_pattern": {r".*\.gate_up_proj": 8}, "alpha_pattern": {r".*\.gate_up_proj": 16}},
    {"rank_pattern": {"experts.down_proj": 2}, "use_rslora": True, "target_modules": ["o_proj"]},
    {"alpha_pattern": {"model.layers.1.mlp.experts.gate_up_proj": 3}},
    {"target_modules": r".*self_attn\.(q|v)_proj", "rank_pattern": {"q_proj": 9}},
]


def assert_same_deltas(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", FUSED_OPTIONS, ids=str)
def test_each_experts_product_equals_that_of_pefts_parameter_wrapper(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_fused(tmp_path / "x", family, **options)
    facts = check_adapter("a", str(folder), BaseShapes.from_config(moe_config(family)))
    assert facts.has_experts
    assert_same_deltas(deltas_as_served(folder), deltas_of_peft(folder, family))


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_factors_of_single_experts_equal_what_peft_converts_them_to(
    family: str, tmp_path: Path
) -> None:
    folder = save_single(tmp_path / "x", family)
    facts = check_adapter("a", str(folder), BaseShapes.from_config(moe_config(family)))
    assert facts.modules == {"gate_proj", "up_proj", "down_proj"} and facts.has_experts
    assert_same_deltas(deltas_as_served(folder), deltas_of_peft(folder, family))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_adapter_of_single_experts_that_peft_saved_again_has_the_same_products(
    family: str, tmp_path: Path
) -> None:
    """With transformers 5, PEFT saves it by parameters, with twice the rank for gate_up_proj."""
    single = save_single(tmp_path / "x", family)
    model = peft.PeftModel.from_pretrained(moe_model(family), str(single))
    model.save_pretrained(str(tmp_path / "again"))
    raw, _ = stored(tmp_path / "again")
    assert set(raw["target_parameters"]) == {"gate_up_proj", "down_proj"} and raw["rank_pattern"]
    check_adapter("a", str(tmp_path / "again"), BaseShapes.from_config(moe_config(family)))
    assert_same_deltas(deltas_as_served(tmp_path / "again"), deltas_as_served(single))


def test_patterns_match_the_stored_paths_of_single_experts(tmp_path: Path) -> None:
    patterns = {r"experts\.1\.w1": 8.0, "block_sparse_moe.experts.0.w2": 2.0}
    plain = deltas_as_served(save_single(tmp_path / "plain", "Mixtral"))
    folder = save_single(tmp_path / "x", "Mixtral", alpha_pattern=patterns, lora_alpha=4)
    check_adapter("a", str(folder), BaseShapes.from_config(moe_config("Mixtral")))
    for path, found in deltas_as_served(folder).items():
        gate = up = down = 0.5  # of alpha 8
        if ".experts.1." in path:
            gate = 1.0
        if ".experts.0." in path:
            down = 0.25
        factors = torch.full((len(found), 1), down)
        if path.endswith("gate_up_proj"):
            factors = torch.tensor([gate] * INNER + [up] * INNER).unsqueeze(1)
        torch.testing.assert_close(found, factors * plain[path])


def test_parts_of_a_parameter_are_views_of_the_stored_tensor(tmp_path: Path) -> None:
    raw, tensors = stored(save_fused(tmp_path / "x"))
    made = one_rank_tensors("a", raw, tensors)
    assert len(made) == LAYERS * EXPERTS * 4
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in made.values()} == storages
    assert made[f"{EXPERTS0}.3.gate_up_proj.lora_A.weight"].shape == (RANK, HIDDEN)
    assert made[f"{EXPERTS0}.3.gate_up_proj.lora_B.weight"].shape == (2 * INNER, RANK)
    assert made[f"{EXPERTS0}.0.down_proj.lora_A.weight"].shape == (RANK, INNER)
    assert made[f"{EXPERTS0}.0.down_proj.lora_B.weight"].shape == (HIDDEN, RANK)
    assert why_not_stacked({name: tuple(t.shape) for name, t in made.items()}, RANK) is None


def test_only_names_of_mixtral_experts_are_changed(tmp_path: Path) -> None:
    raw, tensors = stored(save_single(tmp_path / "x", "Mixtral"))
    dense = "base_model.model.model.layers.0.feed_forward.w1.lora_A.weight"
    tensors[dense] = torch.ones(RANK, HIDDEN)
    made = one_rank_tensors("a", raw, tensors)
    assert dense in made and len(made) == len(tensors)
    moved = f"{EXPERTS0.replace('mlp', 'block_sparse_moe')}.2"
    assert made[f"{moved}.up_proj.lora_B.weight"] is tensors[f"{moved}.w3.lora_B.weight"]


def test_adapter_of_single_experts_without_patterns_keeps_its_tensors(tmp_path: Path) -> None:
    raw, tensors = stored(save_single(tmp_path / "x"))
    made = one_rank_tensors("a", raw, tensors)
    assert made.keys() == tensors.keys()
    assert all(made[key] is tensor for key, tensor in tensors.items())
    assert not needs_one_rank(raw)
    assert one_rank_config("a", raw, {k: tuple(t.shape) for k, t in tensors.items()}) == raw


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["gate_up_proj_moe", "down_proj_moe"]),
        ({"target_parameters": ["gate_up_proj"]}, ["gate_up_proj_moe"]),
        (
            {"target_parameters": ["down_proj"], "target_modules": ["up_proj", "q_proj"]},
            ["down_proj_moe", "gate_up_proj", "qkv_proj"],  # gate_up_proj of the shared expert
        ),
    ],
    ids=str,
)
def test_served_modules_of_parameters_are_those_of_experts(
    options: dict[str, Any], wanted: list[str], tmp_path: Path
) -> None:
    folder = save_fused(tmp_path / "x", "Qwen2Moe", **options)
    assert {name for _, name in served_modules("a", str(folder))} == set(wanted)
    raw, tensors = stored(folder)
    config = one_rank_config("a", raw, {key: tuple(t.shape) for key, t in tensors.items()})
    assert needs_one_rank(raw) and not config["target_parameters"]
    assert {"gate_up_proj", "down_proj"} <= set(config["target_modules"])


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_config_of_a_part_of_experts_names_both_modules_of_experts(
    family: str, projection: str, tmp_path: Path
) -> None:
    folder = save_single(tmp_path / "x", family, projections=[projection])
    module = "down_proj" if projection == "down_proj" else "gate_up_proj"
    assert {name for _, name in served_modules("a", str(folder))} == {f"{module}_moe"}
    raw, tensors = stored(folder)
    config = one_rank_config("a", raw, {key: tuple(t.shape) for key, t in tensors.items()})
    assert needs_one_rank(raw)
    assert set(config["target_modules"]) == {projection, "gate_up_proj", "down_proj"}


def test_tensors_of_a_request_are_checked_as_those_of_a_folder(tmp_path: Path) -> None:
    base = BaseShapes.from_config(moe_config("Qwen3Moe"))
    for folder in (save_fused(tmp_path / "fused"), save_single(tmp_path / "single")):
        raw, tensors = stored(folder)
        found, wanted = (
            check_tensors("a", raw, tensors, base),
            check_adapter("a", str(folder), base),
        )
        assert (found.modules, found.rank, found.size_bytes, found.has_experts) == (
            *(wanted.modules, wanted.rank, wanted.size_bytes),
            True,
        )
        assert read_adapter("a", str(folder)).keys() == tensors.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({f"{EXPERTS0}.lora_A.weight": torch.ones(EXPERTS * RANK + 1, INNER)}),
        lambda t: t.update({f"{EXPERTS0}.lora_A.weight": torch.ones(RANK, INNER)}),
        lambda t: t.update({f"{EXPERTS0}.lora_A.weight": torch.ones(0, INNER)}),
        lambda t: t.update({f"{EXPERTS0}.lora_A.weight": torch.ones(RANK, EXPERTS, INNER)}),
        lambda t: t.update({f"{EXPERTS0}.lora_A.weight": torch.ones(5000 * RANK, 1)}),
    ],
    ids=["rows", "experts", "none", "dimensions", "many"],
)
def test_weights_that_changed_after_the_check_are_refused_when_they_are_split(
    change: Any, tmp_path: Path
) -> None:
    raw, tensors = stored(save_fused(tmp_path / "x"))
    change(tensors)
    with pytest.raises(AdapterError, match="has shape"):
        one_rank_tensors("a", raw, tensors)
    raw["target_parameters"] = ["down_proj"]
    with pytest.raises(AdapterError, match="names no parameter"):
        one_rank_tensors("a", raw, tensors)
