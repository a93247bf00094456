"""Shapes of base models, known and unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_elora.adapters import BaseShapes, check_adapter
from tests.harness.peft_adapters import (
    HIDDEN,
    INTERMEDIATE,
    SIZES,
    assert_in,
    edit_config,
    refusal,
    tiny_config,
)


def test_unknown_base_skips_shapes_only(adapter: Path) -> None:
    base = BaseShapes.unknown("no such architecture")
    assert not base.known
    check_adapter("a", str(adapter), base)
    edit_config(adapter, r=16)
    assert_in(refusal(adapter, base), "rank 4", "r=16")


def test_base_shapes_are_read_from_a_model_folder(tmp_path: Path) -> None:
    tiny_config("Llama").save_pretrained(str(tmp_path))
    base = BaseShapes.from_pretrained(str(tmp_path))
    assert base == BaseShapes.from_config(tiny_config("Llama"))
    shape = base.modules["model.layers.1.mlp.down_proj"]
    assert (shape.in_size, shape.out_size) == (INTERMEDIATE, HIDDEN)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "mxfp4"},
    ],
    ids=lambda config: str(config["quant_method"]),
)
def test_quantised_base_has_its_unpacked_module_shapes(
    tmp_path: Path, quantization: dict[str, object]
) -> None:
    """Not those of its packed weights, which may also need packages that are not there."""
    tiny_config("Llama").save_pretrained(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    assert BaseShapes.from_pretrained(str(tmp_path)) == BaseShapes.from_config(tiny_config("Llama"))


@pytest.mark.parametrize("content", ['{"model_type": "never_heard_of"}', "{", '{"x": 1}'])
def test_unbuildable_base_gives_a_reason_and_no_shapes(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    base = BaseShapes.from_pretrained(str(tmp_path))
    assert base.reason and str(tmp_path) in base.reason
    assert not base.modules


def test_base_shapes_find_the_text_model_of_a_multimodal_one(saved: Path) -> None:
    import transformers

    text = SIZES | {"sliding_window": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 16}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**text),
        vision_config=transformers.PixtralVisionConfig(**vision),
    )
    base = BaseShapes.from_config(config)
    assert base.reason is None
    assert "model.language_model.layers.1.self_attn.q_proj" in base.modules
    check_adapter("a", str(saved), base)
