"""Adapters of MoE experts: what is accepted, and what is refused with which reason."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sglang_elora.adapters import (
    AdapterError,
    BaseShapes,
    check_adapter,
    check_tensors,
    served_modules,
    tensor_rules,
)
from sglang_elora.adapters import base_shapes as base_shapes_module
from tests.harness.peft_adapters import (
    CONFIG,
    HIDDEN,
    RANK,
    SIZES,
    WEIGHTS,
    Tensors,
    assert_in,
    edit_config,
    edit_tensors,
    refusal,
    tiny_config,
)
from tests.unit.moe_adapters import (
    EXPERTS,
    EXPERTS0,
    INNER,
    PREFIX,
    moe_config,
    save_fused,
    save_single,
    stored,
)

SINGLE0 = f"{EXPERTS0}.0.gate_proj"
Change = Callable[[Tensors], Any]


@pytest.fixture(scope="module")
def moe() -> BaseShapes:
    return BaseShapes.from_config(moe_config("Qwen3Moe"))


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    return save_fused(tmp_path / "fused")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_single(tmp_path / "single")


def put(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


# The base model's shapes
def test_base_shapes_hold_both_parameters_of_experts(moe: BaseShapes) -> None:
    path = "model.layers.1.mlp.experts"
    found = moe.modules[f"{path}.gate_up_proj"]
    assert (found.in_size, found.out_size, found.num_experts) == (HIDDEN, 2 * INNER, EXPERTS)
    found = moe.modules[f"{path}.down_proj"]
    assert (found.in_size, found.out_size, found.num_experts) == (INNER, HIDDEN, EXPERTS)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
@pytest.mark.parametrize(
    "path",
    [
        *("model.layers.0.mlp.experts.2.up_proj", "layers.0.mlp.experts.2.up_proj"),
        *("model.layers.0.block_sparse_moe.experts.2.w3", "model.layers.0.mlp.experts.2.w3"),
        "model.language_model.layers.0.mlp.experts.2.up_proj",
    ],
)
def test_base_shapes_find_a_single_expert_by_all_its_names(family: str, path: str) -> None:
    found = BaseShapes.from_config(moe_config(family)).find(path)
    assert found is not None and found[0] == "model.layers.0.mlp.experts.2.up_proj"
    assert (found[1].in_size, found[1].out_size, found[1].num_experts) == (HIDDEN, INNER, 0)


@pytest.mark.parametrize(
    "path",
    [
        *("experts.4.up_proj", "experts.04.up_proj", "experts.0.gate_up_proj", "experts.0.fc1"),
        *("experts.up_proj", "experts.x.up_proj", "experts.\u0663.up_proj", "experts.0.up_proj.x"),
        *("experts.99999999.up_proj", "shared_experts.0.up_proj", "experts.-1.up_proj"),
    ],
)
def test_base_shapes_find_no_other_names_of_experts(path: str, moe: BaseShapes) -> None:
    assert moe.find(f"model.layers.0.mlp.{path}") is None


def test_experts_that_are_modules_of_their_own_are_found_as_such(tmp_path: Path) -> None:
    """As in models with remote code."""

    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = torch.nn.Linear(HIDDEN, INNER, bias=False)

    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList([Expert(), Expert()])
    shapes, unserved = base_shapes_module._shapes_of(model)
    base = BaseShapes(modules=shapes, unserved=unserved)
    found = base.find("experts.1.gate_proj")
    assert found is not None and found[0] == "experts.1.w1" and not unserved
    assert base.find("experts.2.w1") is None
    assert base.has_target("w1") and base.has_target("gate_proj") and not base.has_target("w3")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.GptOssConfig(**SIZES, num_local_experts=4),
            "the parameters gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias",
        ),
        (
            transformers.Llama4TextConfig(**SIZES, num_local_experts=4, intermediate_size_mlp=96),
            "stored transposed",
        ),
    ],
    ids=["gpt-oss", "Llama 4"],
)
def test_experts_with_transposed_parameters_are_refused(
    config: Any, reason: str, tmp_path: Path, fused: Path, single: Path
) -> None:
    base = BaseShapes.from_config(config)
    assert base.known and not any(shape.num_experts for shape in base.modules.values())
    name = "feed_forward" if "Llama" in type(config).__name__ else "mlp"
    edit_config(fused, target_parameters=["gate_up_proj", "down_proj"])
    for folder in (fused, single):
        edit_tensors(folder, lambda t: [t.update({k.replace("mlp", name): t.pop(k)}) for k in [*t]])
        assert_in(refusal(folder, base), f"{name}.experts.", "belongs to MoE experts", reason)


# What is accepted
@pytest.mark.parametrize("projections", [["up_proj"], ["gate_proj"], ["down_proj", "up_proj"]])
@pytest.mark.parametrize("experts", [[3], [0, 2]])
def test_weights_of_some_experts_and_projections_are_accepted(
    experts: list[int], projections: list[str], tmp_path: Path, moe: BaseShapes
) -> None:
    folder = save_single(tmp_path / "x", experts=experts, projections=projections)
    facts = check_adapter("a", str(folder), moe)
    assert facts.modules == set(projections) and facts.has_experts and facts.rank == RANK


def test_weights_of_some_layers_are_accepted(fused: Path, moe: BaseShapes) -> None:
    edit_tensors(fused, lambda t: [t.pop(name) for name in [*t] if ".layers.1." in name])
    assert check_adapter("a", str(fused), moe).modules == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [None, [], ""])
def test_no_target_modules_are_needed_with_target_parameters(
    targets: Any, fused: Path, moe: BaseShapes
) -> None:
    edit_config(fused, target_modules=targets)
    check_adapter("a", str(fused), moe)
    edit_config(fused, target_parameters=None)
    assert_in(refusal(fused, moe), CONFIG, "target_modules")


@pytest.mark.parametrize("targets", ["all-linear", r".*experts\.\d\.(gate|up|down)_proj"])
def test_single_experts_may_be_targeted_by_a_text(
    targets: str, single: Path, moe: BaseShapes
) -> None:
    edit_config(single, target_modules=targets)
    assert check_adapter("a", str(single), moe).has_experts


def test_target_of_experts_without_weights_is_accepted(single: Path, moe: BaseShapes) -> None:
    edit_tensors(single, lambda t: [t.pop(name) for name in [*t] if "down_proj" in name])
    check_adapter("a", str(single), moe)
    edit_config(single, target_modules=["gate_proj", "up_proj", "experts.3.down_proj"])
    check_adapter("a", str(single), moe)
    edit_config(single, target_modules=["gate_proj", "up_proj", "experts.fc2"])
    assert_in(refusal(single, moe), "target module 'experts.fc2' has no weights")


def test_single_experts_are_served_by_their_names_if_the_base_is_unknown(
    single: Path, fused: Path
) -> None:
    base = BaseShapes.unknown("no such architecture")
    assert check_adapter("a", str(single), base).has_experts
    assert_in(refusal(fused, base), "all experts", "which are unknown: no such architecture")


def test_shared_experts_are_modules_as_any(tmp_path: Path) -> None:
    base = BaseShapes.from_config(moe_config("Qwen2Moe"))
    options = {"target_modules": ["up_proj"], "target_parameters": None}
    folder = save_fused(tmp_path / "x", "Qwen2Moe", **options)
    facts = check_adapter("a", str(folder), base, target_modules={"gate_up_proj"})
    assert facts.modules == {"up_proj"} and not facts.has_experts
    assert {name for _, name in served_modules("a", str(folder))} == {"gate_up_proj"}


# The server's limits
@pytest.mark.parametrize("form", ["fused", "single"])
def test_experts_need_both_modules_of_the_server(
    form: str, tmp_path: Path, moe: BaseShapes
) -> None:
    if form == "fused":
        folder = save_fused(tmp_path / "x", target_parameters=["down_proj"])
    else:
        folder = save_single(tmp_path / "x", projections=["down_proj"])
    check_adapter("a", str(folder), moe, target_modules={"gate_up_proj", "down_proj"})
    check_adapter("a", str(folder), moe, target_modules={"gate_proj", "up_proj", "down_proj"})
    text = refusal(folder, moe, target_modules={"down_proj", "q_proj"})
    assert_in(text, "adapts gate_up_proj", "experts need both", "down_proj gate_up_proj qkv_proj")


def test_rank_of_a_parameter_is_that_of_one_expert(tmp_path: Path, moe: BaseShapes) -> None:
    folder = save_fused(tmp_path / "x", rank_pattern={"gate_up_proj": 16})
    assert check_adapter("a", str(folder), moe, max_rank=16).rank == 16
    assert_in(refusal(folder, moe, max_rank=15), "rank r=16 is above")


# target_parameters
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (["mlp.down_proj.weight"], ["is set to 'mlp.down_proj.weight'", "other than gate_up_proj"]),
        (["gate_up_proj", "down_proj", "gate.weight"], ["is set to 'gate.weight'", "a router's"]),
        (["mlp.expert.down_proj"], ["is set to 'mlp.expert.down_proj'", "no parameter of MoE"]),
        (["layers.2.mlp.experts.down_proj", "down_proj"], ["is set to 'layers.2.mlp"]),
        ("gate_up_proj", ["must be a list of names, got 'gate_up_proj'"]),
        ([["gate_up_proj"]], ["must be a list of names"]),
        ({"gate_up_proj": 1}, ["must be a list of names"]),
        (["down_proj"] * 5000, ["has 5000 names"]),
        (["down_proj"], ["base_layer.lora_A.weight", "no parameter that target_parameters names"]),
        (["layers.0.mlp.experts.down_proj"], ["no parameter that target_parameters names"]),
        (None, ["no parameter that target_parameters names"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_target_parameters_are_refused(
    value: Any, parts: list[str], fused: Path, moe: BaseShapes
) -> None:
    edit_config(fused, target_parameters=value, target_modules=["q_proj"])
    assert_in(refusal(fused, moe), "target_parameters", *parts)


def test_target_parameters_of_a_dense_model_are_refused(fused: Path) -> None:
    base = BaseShapes.from_config(tiny_config("Qwen3"))
    assert_in(
        refusal(fused, base), "is set to 'mlp.experts.down_proj', no parameter of MoE experts"
    )


# Tensors
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (put(f"{EXPERTS0}.lora_A.weight", 17, INNER), ["rank 17 for 4 experts", "says r=4"]),
        (put(f"{EXPERTS0}.lora_A.weight", 20, INNER), ["rank 20 for 4 experts"]),
        (put(f"{EXPERTS0}.lora_A.weight", RANK, INNER), ["rank 4 for 4 experts"]),
        (put(f"{EXPERTS0}.lora_B.weight", HIDDEN, 32), ["lora_B.weight has rank 32 for 4"]),
        (put(f"{EXPERTS0}.lora_B.weight", HIDDEN, RANK), ["lora_B.weight has rank 4 for 4"]),
        (put(f"{EXPERTS0}.lora_A.weight", 16, HIDDEN), ["input size 64, the base module has 24"]),
        (put(f"{EXPERTS0}.base_layer.lora_B.weight", INNER, 16), ["output size 24", "has 48"]),
        (put(f"{EXPERTS0}.lora_A.weight", EXPERTS, RANK, INNER), ["[4, 4, 24], not a matrix"]),
        (put(f"{EXPERTS0}.lora_A.weight", 0, INNER), ["[0, 24], not a matrix"]),
        (drop(f"{EXPERTS0}.lora_B.weight"), [f"{EXPERTS0}.lora_A.weight", "no matching lora_B"]),
        (drop(f"{EXPERTS0}.base_layer.lora_A.weight"), ["no matching lora_A"]),
        (put(f"{EXPERTS0}.lora_A.default.weight", 16, INNER), ["are the same factor"]),
        (put(f"{EXPERTS0}.base_layer.base_layer.lora_A.weight", 4, 4), ["no projection of MoE"]),
        (put(f"{EXPERTS0}.gate_up_proj.lora_A.weight", 16, HIDDEN), ["no projection of MoE"]),
        (put(f"{EXPERTS0}.lora_embedding_A", 16, HIDDEN), ["which are no embedding"]),
        (put(f"{SINGLE0}.lora_A.weight", RANK, HIDDEN), ["one expert", "all experts", "one form"]),
        (
            put(f"{PREFIX}model.layers.1.mlp.experts.0.w2.lora_A.weight", RANK, INNER),
            ["experts.0.w2", "belongs to one expert"],
        ),
        (
            put(f"{PREFIX}model.layers.9.mlp.experts.lora_A.weight", 16, INNER),
            ["layer 9", "layers 0 to 1"],
        ),
        (put(f"{PREFIX}model.layers.0.mlp.gate.lora_A.weight", RANK, HIDDEN), ["gate", "router"]),
    ],
    ids=lambda value: value[0][-30:] if isinstance(value, list) else "",
)
def test_bad_tensor_of_all_experts_is_refused(
    change: Change, parts: list[str], fused: Path, moe: BaseShapes
) -> None:
    edit_tensors(fused, change)
    assert_in(refusal(fused, moe), f"{fused}/{WEIGHTS}", *parts)
    raw, tensors = stored(fused)
    with pytest.raises(AdapterError, match="request"):
        check_tensors("a", raw, tensors, moe)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            put(f"{EXPERTS0}.4.up_proj.lora_A.weight", RANK, HIDDEN),
            ["experts.4.up_proj", "an expert that is not there", "experts 0 to 3"],
        ),
        (put(f"{EXPERTS0}.04.up_proj.lora_A.weight", RANK, HIDDEN), ["no projection of MoE"]),
        (put(f"{EXPERTS0}.0.fc1.lora_A.weight", RANK, HIDDEN), ["no projection of MoE experts"]),
        (put(f"{EXPERTS0}.0.gate_up_proj.lora_A.weight", 4, HIDDEN), ["no projection of MoE"]),
        (put(f"{EXPERTS0}.gate_proj.lora_A.weight", 1, RANK, HIDDEN), ["no projection of MoE"]),
        (
            put(f"{PREFIX}model.layers.0.mlp.shared_experts.0.up_proj.lora_A.weight", 4, HIDDEN),
            ["no projection of MoE experts"],
        ),
        (put(f"{SINGLE0}.lora_A.weight", RANK, INNER), ["input size 24", "has 64"]),
        (put(f"{SINGLE0}.lora_B.weight", 2 * INNER, RANK), ["output size 48", "has 24"]),
        (put(f"{SINGLE0}.lora_B.weight", INNER, 8), ["rank 8", "r=4"]),
        (put(f"{SINGLE0}.lora_A.weight", EXPERTS, RANK, HIDDEN), ["[4, 4, 64], not a matrix"]),
        (drop(f"{SINGLE0}.lora_A.weight"), [f"{SINGLE0}.lora_B.weight", "no matching lora_A"]),
        (put(f"{EXPERTS0}.0.w1.lora_A.weight", RANK, HIDDEN), ["0.w1", "are the same factor"]),
        (put(f"{EXPERTS0}.lora_A.weight", 16, INNER), ["target_parameters names"]),
        (put(f"{PREFIX}model.layers.0.mlp.gate.lora_A.weight", RANK, HIDDEN), ["router of MoE"]),
    ],
    ids=lambda value: value[0][-30:] if isinstance(value, list) else "",
)
def test_bad_tensor_of_one_expert_is_refused(
    change: Change, parts: list[str], single: Path, moe: BaseShapes
) -> None:
    edit_tensors(single, change)
    assert_in(refusal(single, moe), f"{single}/{WEIGHTS}", *parts)


def test_target_parameters_do_not_target_modules_of_the_same_name(
    tmp_path: Path, single: Path, moe: BaseShapes
) -> None:
    edit_config(single, target_parameters=["gate_up_proj", "down_proj"], target_modules=[])
    assert_in(refusal(single, moe), CONFIG, "weights of 'down_proj' are not in target_modules")


# Large adapters
def write_large(folder: Path, num_layers: int, num_experts: int) -> Path:
    """An adapter with factors of each expert, of zeros that take no space on disk."""
    save_single(folder)
    header, end = {}, 0
    for layer in range(num_layers):
        for expert in range(num_experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                sizes = (INNER, HIDDEN) if name == "down_proj" else (HIDDEN, INNER)
                path = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{name}"
                for side, shape in (("A", [RANK, sizes[0]]), ("B", [sizes[1], RANK])):
                    begin, end = end, end + 2 * shape[0] * shape[1]
                    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
                    header[f"{path}.lora_{side}.weight"] = entry
    content = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        stream.truncate(8 + len(content) + end)
    return folder


def test_adapter_of_each_expert_of_a_235b_model_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """94 layers of 128 experts. Each module's path is compared a fixed number of times."""
    config = moe_config("Qwen3Moe")
    config.num_hidden_layers, config.num_experts = 94, 128
    base = BaseShapes.from_config(config)
    folder = write_large(tmp_path / "x", 94, 128)
    calls = 0

    def counted(path: str) -> str:
        nonlocal calls
        calls += 1
        return original(path)

    original = base_shapes_module.canonical
    monkeypatch.setattr(base_shapes_module, "canonical", counted)
    monkeypatch.setattr(tensor_rules, "canonical", counted)
    facts = check_adapter("a", str(folder), base, read_weights=False)
    assert facts.num_parameters == 94 * 128 * 3 * RANK * (HIDDEN + INNER)
    num_modules = 94 * 128 * 3
    assert calls <= 3 * num_modules
    assert {name for _, name in served_modules("a", str(folder))} == {
        "gate_up_proj_moe",
        "down_proj_moe",
    }
