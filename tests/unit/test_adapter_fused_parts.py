"""Zero matrices for the missing parts of projections that SGLang stacks, also of MoE experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.srt.lora.adapter_weights import complete_fused_modules

MLP = "base_model.model.model.layers.0.mlp"


def completed(
    names: list[str], *, has_gate: bool = True, base_model: Any = None
) -> dict[str, torch.Tensor]:
    """The weights of a layer after the hook: A is ``[2, 8]``, B is ``[6, 2]``."""
    weights = {}
    for name in names:
        weights[f"{MLP}.{name}.lora_A.weight"] = torch.ones(2, 8)
        weights[f"{MLP}.{name}.lora_B.weight"] = torch.ones(6, 2)
    adapter: Any = SimpleNamespace(
        layers=[SimpleNamespace(weights=weights)],
        base_hf_config=None,
        base_model=base_model,
        _is_non_gated_moe_weight=lambda name: ".experts." in name and not has_gate,
    )
    complete_fused_modules(adapter)
    return weights


@pytest.mark.parametrize("module", ["", "experts.3.", "experts.0.", "shared_expert."])
@pytest.mark.parametrize(("there", "missing"), [("gate", "up"), ("up", "gate")])
def test_missing_half_of_gate_and_up_becomes_zeros(module: str, there: str, missing: str) -> None:
    weights = completed([f"{module}{there}_proj", f"{module}down_proj"])
    assert len(weights) == 6
    for side, shape in (("A", (2, 8)), ("B", (6, 2))):
        zeros = weights[f"{MLP}.{module}{missing}_proj.lora_{side}.weight"]
        assert zeros.shape == shape and not zeros.any()
        assert weights[f"{MLP}.{module}{there}_proj.lora_{side}.weight"].all()


def test_each_expert_is_completed_by_itself() -> None:
    weights = completed(["experts.0.gate_proj", "experts.1.up_proj", "experts.2.gate_up_proj"])
    assert {name.removeprefix(f"{MLP}.experts.").split(".lora_")[0] for name in weights} == {
        *("0.gate_proj", "0.up_proj", "1.gate_proj", "1.up_proj", "2.gate_up_proj")
    }
    assert not weights[f"{MLP}.experts.0.up_proj.lora_B.weight"].any()
    assert not weights[f"{MLP}.experts.1.gate_proj.lora_B.weight"].any()


def test_experts_without_a_gate_are_not_completed() -> None:
    assert len(completed(["experts.0.up_proj", "experts.1.gate_proj"], has_gate=False)) == 4


def test_up_projection_of_an_mlp_without_a_gate_is_left_alone() -> None:
    layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up_proj": torch.nn.Identity()})})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    assert len(completed(["up_proj"], base_model=model)) == 2


LINEAR = SimpleNamespace(
    model_type="qwen3_5_text",
    linear_num_key_heads=1,
    linear_key_head_dim=2,
    linear_num_value_heads=3,
    linear_value_head_dim=4,
    num_attention_heads=3,
    num_key_value_heads=1,
)


def linear_attention(**sizes: int) -> dict[str, torch.Tensor]:
    """What the hook makes of these projections, by their output sizes. Names are without a path."""
    parent, weights = "base_model.model.model.layers.0.linear_attn", {}
    for i, (name, size) in enumerate(sizes.items()):
        weights[f"{parent}.{name}.lora_A.weight"] = torch.full((2, 8), 1.0 + i)
        weights[f"{parent}.{name}.lora_B.weight"] = torch.arange(size)[:, None].expand(size, 2)
    adapter: Any = SimpleNamespace(
        layers=[SimpleNamespace(weights=weights)],
        base_hf_config=LINEAR,
        base_model=None,
        _is_non_gated_moe_weight=lambda name: False,
    )
    complete_fused_modules(adapter)
    return {
        name.removeprefix(f"{parent}.").removesuffix(".weight"): w for name, w in weights.items()
    }


def test_q_k_and_v_of_linear_attention_share_what_peft_has_as_one() -> None:
    """SGLang stacks q, k, v and z itself."""
    made = linear_attention(in_proj_qkv=16, in_proj_z=12)
    assert {name for name in made if "lora_A" in name} == {
        f"in_proj_{part}.lora_A" for part in ("q", "k", "v", "z")
    }
    assert [float(made[f"in_proj_{part}.lora_A"][0, 0]) for part in "qkvz"] == [1, 1, 1, 2]
    rows = [made[f"in_proj_{part}.lora_B"][:, 0].tolist() for part in "qkvz"]
    assert rows == [[0, 1], [2, 3], list(range(4, 16)), list(range(12))]


@pytest.mark.parametrize(("there", "sizes"), [("qkv", (16, 12)), ("z", (12, 16))])
def test_missing_part_of_linear_attention_becomes_zeros(there: str, sizes: tuple[int, int]) -> None:
    made = linear_attention(**{f"in_proj_{there}": sizes[0]})
    missing = {"qkv": "z", "z": "qkv"}[there]
    zeros = [made[f"in_proj_{part}.lora_B"] for part in missing]
    assert sum(map(len, zeros)) == sizes[1] and not any(zero.any() for zero in zeros)
    assert len(made) == 8


@pytest.mark.parametrize("there", ["a", "b"])
def test_b_and_a_of_linear_attention_become_one_module(there: str) -> None:
    made = linear_attention(**{f"in_proj_{there}": 3})
    assert made.keys() == {"in_proj_ba.lora_A", "in_proj_ba.lora_B"}
    own = slice(0, 3) if there == "b" else slice(3, 6)  # of B; those of the other are zeros
    assert made["in_proj_ba.lora_A"].shape == (4, 8) and made["in_proj_ba.lora_B"].shape == (6, 2)
    assert made["in_proj_ba.lora_B"][own, 0].tolist() == [0, 1, 2]
    assert made["in_proj_ba.lora_B"].sum() == 6


def test_missing_queries_with_an_output_gate_have_twice_the_rows() -> None:
    made = linear_attention(k_proj=4)
    assert made["q_proj.lora_B"].shape == (2 * 3 * 4, 2)
