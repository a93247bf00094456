"""Zero matrices for the missing parts of projections that SGLang stacks, also of MoE experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.srt.lora.adapter_weights import complete_fused_modules

MLP = "base_model.model.model.layers.0.mlp"


def completed(names: list[str], *, has_gate: bool = True) -> dict[str, torch.Tensor]:
    """The weights of a layer after the hook: A is ``[2, 8]``, B is ``[6, 2]``."""
    weights = {}
    for name in names:
        weights[f"{MLP}.{name}.lora_A.weight"] = torch.ones(2, 8)
        weights[f"{MLP}.{name}.lora_B.weight"] = torch.ones(6, 2)
    adapter: Any = SimpleNamespace(
        layers=[SimpleNamespace(weights=weights)],
        base_hf_config=None,
        base_model=None,
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
