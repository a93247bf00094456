"""Hook bodies that make SGLang's outputs equal to PEFT's for two kinds of adapters.

Two PEFT features load without an error in SGLang 0.5.23 but give different outputs:
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
    """Scale by alpha / sqrt(rank) if the adapter is configured so. Runs after
    ``LoRAAdapter.__init__``.

    Source: PEFT's ``use_rslora`` (Kalajdzievski, arXiv 2312.03732).
    """
    if config.hf_config.get("use_rslora", False):
        self.scaling = config.lora_alpha / config.r**0.5


def complete_fused_modules(self: LoRAAdapter) -> None:
    """Add zero matrices for the missing parts of a fused module. Runs before
    ``LoRAAdapter._normalize_weights``.

    An adapter on q_proj alone, or on up_proj without gate_proj, is valid in PEFT. SGLang stacks the
    parts of a fused projection and expects them all; a pair of zero matrices leaves the output of a
    part unchanged. Experts of MoE layers are handled by SGLang.
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
        return rows  # k and v have equal sizes, and so have gate and up
    heads: int = config.num_attention_heads
    kv_heads: int = config.num_key_value_heads
    if part == "q_proj":
        return rows * heads // kv_heads
    return rows * kv_heads // heads
