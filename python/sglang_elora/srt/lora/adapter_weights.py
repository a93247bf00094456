"""Hook bodies that make SGLang compute what PEFT means, for adapters it would get wrong.

Two PEFT features load without an error in SGLang 0.5.23 and give other outputs:
rank-stabilised scaling, and adapters on part of a fused projection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that SGLang stacks into one matrix (qkv_proj, gate_up_proj)."""

_MEMBER = re.compile(r"(?<=\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)(?=\.lora_([AB])\.)")


def scale_rslora(
    result: None, self: LoRAAdapter, uid: str, config: LoRAConfig, *_: Any, **__: Any
) -> None:
    """After ``LoRAAdapter.__init__``: scale by alpha / sqrt(rank) where the adapter asks for it.

    Source: PEFT's ``use_rslora`` (Kalajdzievski, arXiv 2312.03732).
    """
    if config.hf_config.get("use_rslora", False):
        self.scaling = config.lora_alpha / config.r**0.5


def complete_fused_modules(self: LoRAAdapter) -> None:
    """Before ``LoRAAdapter._normalize_weights``: zeros for the missing parts of a fused module.

    An adapter on q_proj alone, or on up_proj without gate_proj, is valid PEFT. SGLang stacks
    the parts of a fused projection and expects them all; a pair of zero matrices is the
    identity for a part that the adapter leaves alone. Experts of MoE layers are left to SGLang.
    """
    for layer in self.layers:
        weights = layer.weights
        for name in [name for name in weights if ".experts." not in name]:
            match = _MEMBER.search(name)
            if match is None or name.replace(match[1], "x_proj") in weights:  # Mamba's gate
                continue
            group = next(group for group in _FUSED if match[1] in group)
            for part in group:
                sibling = f"{name[: match.start()]}{part}{name[match.end() :]}"
                if sibling in weights:
                    continue
                rows, columns = weights[name].shape
                if match[2] == "B":
                    rows = _out_features(self.base_hf_config, part, like=match[1], rows=rows)
                weights[sibling] = torch.zeros(rows, columns, dtype=weights[name].dtype)


def _out_features(config: Any, part: str, *, like: str, rows: int) -> int:
    """Output size of projection ``part``, given that of its sibling ``like``."""
    if "q_proj" not in (part, like):
        return rows  # k and v are alike, gate and up are alike
    heads: int = config.num_attention_heads
    kv_heads: int = config.num_key_value_heads
    if part == "q_proj":
        return rows * heads // kv_heads
    return rows * kv_heads // heads
