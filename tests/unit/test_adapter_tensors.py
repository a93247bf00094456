"""Tensors that cannot be served, alone or with the rest of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_elora.adapters import BaseShapes, check_adapter
from tests.harness.peft_adapters import (
    ALL_LINEAR,
    CONFIG,
    HIDDEN,
    LAYERS,
    Q0,
    RANK,
    VOCAB,
    WEIGHTS,
    Tensors,
    assert_in,
    edit_config,
    edit_tensors,
    refusal,
    save_adapter,
    tiny_config,
)


def put(name: str, *shape: int, dtype: str = "float32") -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(*shape, dtype=getattr(torch, dtype))})


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)


P = "base_model.model."


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (put(f"{Q0}.lora_magnitude_vector", 64), ["lora_magnitude_vector", "DoRA"]),
        (put(f"{Q0}.lora_B.bias", 64), [f"{Q0}.lora_B.bias", "lora_bias"]),
        (put(f"{Q0}.base_layer.bias", 64), ["base_layer.bias", "trained bias"]),
        (put(f"{P}model.norm.weight", 64), ["model.norm.weight", "not a LoRA factor"]),
        (put("weight", 64), ["weight is not a LoRA factor"]),
        (put(f"{P}lm_head.weight", VOCAB, HIDDEN), ["lm_head.weight", "cannot be compared"]),
        (put(f"{P}model.embed_tokens.weight", 3), ["embed_tokens.weight", "not a LoRA factor"]),
        (put(f"{Q0}.lora_E", RANK, 1), ["lora_E", "not a LoRA factor"]),
        (put(f"{Q0}.base_layer.weight", 64, 64), ["q_proj.base_layer.weight"]),
        (put(f"{Q0}.lora_A.other.weight", 4, 64), ["lora_A.other.weight"]),
        (put(f"{Q0}.lora_A.weight", 4, 64, dtype="int8"), [f"{Q0}.lora_A.weight", "I8"]),
        (
            put(f"{P}model.layers.0.mlp.experts.3.up_proj.lora_A.weight", 4, 64),
            ["the base model has no MoE experts", "experts.3.up_proj"],
        ),
        (
            put(f"{P}model.vision_tower.encoder.layers.0.q_proj.lora_A.weight", 4, 64),
            ["vision_tower", "vision or audio encoder"],
        ),
        (put(f"{P}model.layers.0.mlp.fc1.lora_A.weight", 4, 64), ["no linear module", "mlp.fc1"]),
        (
            put(f"{P}model.layers.40.self_attn.q_proj.lora_A.weight", 4, 64),
            ["layer 40", "layers 0 to 1"],
        ),
        (drop(f"{Q0}.lora_B.weight"), [f"{Q0}.lora_A.weight", "no matching lora_B"]),
        (drop(f"{Q0}.lora_A.weight"), [f"{Q0}.lora_B.weight", "no matching lora_A"]),
        (put(f"{Q0}.lora_A.default.weight", 4, 64), ["are the same factor"]),
        (
            put(f"{Q0}.lora_A.weight", 4, 80),
            ["input size 80", "base module has 64", "another base"],
        ),
        (put(f"{Q0}.lora_B.weight", 80, 4), ["output size 80", "base module has 64"]),
        (put(f"{Q0}.lora_A.weight", 0), [f"{Q0}.lora_A.weight", "shape [0]"]),
        (put(f"{Q0}.lora_A.weight", 2, 4, 64), ["shape [2, 4, 64]"]),
        (put(f"{Q0}.lora_A.weight", 8, 64), ["rank 8", "r=4", CONFIG]),
        (put(f"{Q0}.lora_B.weight", 64, 8), ["lora_B.weight has rank 8", "r=4"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_tensor_is_refused(
    adapter: Path, base: BaseShapes, change: Callable[[Tensors], None], parts: list[str]
) -> None:
    edit_tensors(adapter, change)
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", *parts)


@pytest.mark.parametrize("name", [f"{P}model.embed_tokens", f"{P}lm_head"])
def test_adapter_with_a_grown_vocabulary_is_refused(
    adapter: Path, base: BaseShapes, name: str
) -> None:
    embedding = "embed_tokens" in name
    kind = "lora_embedding_" if embedding else "lora_"
    end = "" if embedding else ".weight"
    in_size, out_size = (VOCAB + 8, HIDDEN) if embedding else (HIDDEN, VOCAB + 8)

    def add(tensors: Tensors) -> None:
        tensors[f"{name}.{kind}A{end}"] = torch.ones(RANK, in_size)
        tensors[f"{name}.{kind}B{end}"] = torch.ones(out_size, RANK)

    edit_tensors(adapter, add)
    text = refusal(adapter, base)
    assert_in(text, WEIGHTS, f"size {VOCAB + 8}", f"has {VOCAB}", "added tokens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"use_dora": True}, [CONFIG, "use_dora"]),
        ({"modules_to_save": ["lm_head"]}, [WEIGHTS, "lm_head.weight", "saved embedding"]),
        ({"modules_to_save": ["norm"]}, [WEIGHTS, "layernorm.weight", "modules_to_save"]),
        ({"trainable_token_indices": [1]}, [CONFIG, "trainable_token_indices"]),
        ({"lora_bias": True}, [CONFIG, "lora_bias"]),
        ({"init_lora_weights": "pissa"}, [CONFIG, "changed the base weights"]),
    ],
    ids=str,
)
def test_unsupported_peft_options_are_refused_as_saved(
    options: dict[str, Any], parts: list[str], tmp_path: Path, base: BaseShapes
) -> None:
    assert_in(refusal(save_adapter(tmp_path / "x", **options), base), *parts)


def test_trained_biases_of_qwen2_are_refused(tmp_path: Path) -> None:
    base = BaseShapes.from_config(tiny_config("Qwen2"))
    folder = save_adapter(tmp_path / "x", "Qwen2", bias="lora_only")
    assert_in(refusal(folder, base), WEIGHTS, "q_proj", "trained bias")


def test_adapter_of_another_base_model_is_refused(adapter: Path) -> None:
    base = BaseShapes.from_config(tiny_config("Llama", hidden_size=128))
    edit_config(adapter, base_model_name_or_path="org/small")
    text = refusal(adapter, base)
    assert_in(text, "input size 64", "has 128", "'org/small'", "more like this")


def test_rank_that_differs_from_the_config_is_refused(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, r=16)
    text = refusal(adapter, base)
    assert_in(text, WEIGHTS, "rank 4", "r=16", f"and {7 * 2 * LAYERS - 3} more like this")


def test_weights_outside_target_modules_are_refused(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, target_modules=[m for m in ALL_LINEAR if m != "o_proj"])
    assert_in(refusal(adapter, base), CONFIG, "'o_proj'", "not in target_modules")


def test_unknown_target_module_is_refused(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, target_modules=[*ALL_LINEAR, "query_key_value"])
    assert_in(refusal(adapter, base), CONFIG, "'query_key_value'", "no weights and no base")


def test_target_without_weights_is_accepted_if_the_base_has_it(
    adapter: Path, base: BaseShapes
) -> None:
    edit_config(adapter, target_modules=[*ALL_LINEAR, "lm_head"])
    check_adapter("a", str(adapter), base)


@pytest.mark.parametrize(
    ("value", "says"),
    [(float("nan"), "NaN"), (float("-inf"), "infinite"), (-1e37, "1e+37"), (7e4, "at most 65,504")],
)
def test_nan_or_overflowing_weights_are_refused(
    adapter: Path, base: BaseShapes, value: float, says: str
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_B.weight"][0, 0] = value

    edit_tensors(adapter, spoil)
    text = refusal(adapter, base)
    assert_in(text, WEIGHTS, says, f"{Q0}.lora_B.weight")
