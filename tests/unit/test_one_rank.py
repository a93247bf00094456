"""Adapters with rank_pattern and alpha_pattern, read as of one rank: the products are PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from sglang_elora.adapters import (
    NUM_DROPPED,
    BaseShapes,
    check_adapter,
    needs_one_rank,
    one_rank_config,
    one_rank_tensors,
)
from tests.harness.peft_adapters import ALL_LINEAR, CONFIG, RANK, WEIGHTS, save_adapter, tiny_config

OPTIONS: list[dict[str, Any]] = [
    {"rank_pattern": {"q_proj": 8, "down_proj": 2}},
    {"alpha_pattern": {"o_proj": 3, r"layers\.1\.mlp\.up_proj": 24}},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 16, "q_proj": 2}, "use_rslora": True},
    {"rank_pattern": {r".*mlp\.gate_proj": 1}, "alpha_pattern": {r"(q|k)_proj": 1}},
    {"alpha_pattern": {"v_proj": 5}, "lora_alpha": 0},
    {"rank_pattern": dict.fromkeys(ALL_LINEAR, 3), "r": 64},
    {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "k_proj"]},
    {"layers_to_transform": [1], "rank_pattern": {"q_proj": 8}},
]


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def deltas_of_peft(folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each module's weight, by the module's path."""
    base = transformers.AutoModelForCausalLM.from_config(tiny_config("Llama"))
    model: Any = peft.PeftModel.from_pretrained(base, str(folder))
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight("default")
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products_of_one_rank_equal_those_of_peft(
    options: dict[str, Any], tmp_path: Path, base: BaseShapes
) -> None:
    folder = save_adapter(tmp_path / "x", **options)
    raw, tensors = stored(folder)
    facts = check_adapter("a", str(folder), base)
    config = one_rank_config("a", raw, {key: tuple(t.shape) for key, t in tensors.items()})
    made = one_rank_tensors("a", raw, tensors)
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert isinstance(config["target_modules"], list) or config["target_modules"] == "all-linear"
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    found = {}
    for key in made:
        if ".lora_A." in key:
            a, b = made[key], made[key.replace(".lora_A.", ".lora_B.")]
            assert len(a) == b.shape[1] == rank == facts.rank
            path = key.removeprefix("base_model.model.").split(".lora_A.")[0]
            found[path] = scaling * (b @ a)
    expected = deltas_of_peft(folder)
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_adapter_without_patterns_is_left_as_it_is(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "x", rank_pattern={"q_proj": RANK}, use_rslora=True)
    raw, tensors = stored(folder)
    assert one_rank_config("a", raw, {k: tuple(t.shape) for k, t in tensors.items()}) == raw
    made = one_rank_tensors("a", raw, tensors)
    assert all(made[key] is tensor for key, tensor in tensors.items())
    assert not needs_one_rank({**raw, "rank_pattern": {}})


@pytest.mark.filterwarnings("ignore")
def test_rank_above_the_servers_limit_counts_patterns(tmp_path: Path, base: BaseShapes) -> None:
    from sglang_elora.adapters import AdapterError

    folder = save_adapter(tmp_path / "x", rank_pattern={"q_proj": 32})
    with pytest.raises(AdapterError, match="rank r=32 is above the server's --max-lora-rank 16"):
        check_adapter("a", str(folder), base, max_rank=16)


def test_targets_of_an_adapter_for_an_encoder_too_are_those_that_are_served() -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv", "q_proj", "0"]}
    shapes = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 8),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (8, 4),
        "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight": (4, 8),
        "base_model.model.visual.merger.mlp.0.lora_A.weight": (4, 8),
    }
    served = {**raw, "target_modules": ["q_proj"], NUM_DROPPED: 2}
    assert one_rank_config("a", raw, shapes) == served
    assert one_rank_config("a", raw, dict(list(shapes.items())[:2])) == raw
