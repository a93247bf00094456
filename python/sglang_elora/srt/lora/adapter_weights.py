"""Hook bodies that make SGLang's outputs equal to PEFT's for three kinds of adapters.

Three PEFT features load without an error in SGLang 0.5.23 but give different outputs:
rank-stabilised scaling, ranks and scalings by module, and adapters on part of a fused projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sglang_elora.adapters import STACKED, needs_one_rank, one_rank_config, stored_shapes
from sglang_elora.config import active_config

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

_MEMBER = re.compile(
    rf"(?<=\.)({'|'.join(part for group in STACKED for part in group)})(?=\.lora_([AB])\.)"
)


def read_one_rank(result: None, self: LoRAConfig, *_: Any, **__: Any) -> None:
    """Read a configuration with patterns as that of an adapter of one rank, and take modules that
    an expression names from the weights. Runs after ``LoRAConfig.__init__``; ``stored_config`` is
    what ``one_rank_tensors`` needs.

    Raises:
        AdapterError: The files cannot be read any more.
    """
    may_drop = active_config().tower_weights == "drop"
    if self.path is None or not (needs_one_rank(self.hf_config) or may_drop):
        return
    self.elora_stored = self.hf_config
    self.hf_config = one_rank_config(self.path, self.hf_config, stored_shapes(self.path, self.path))
    self.r, self.lora_alpha = self.hf_config["r"], self.hf_config["lora_alpha"]
    self.target_modules = self.hf_config["target_modules"]


def stored_config(config: LoRAConfig) -> Mapping[str, Any]:
    """The content of the adapter's file, before ``read_one_rank``."""
    found: Mapping[str, Any] = getattr(config, "elora_stored", config.hf_config)
    return found


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
    part unchanged. Experts without a gate have no fused projection.
    """
    for layer in self.layers:
        weights = layer.weights
        for name in list(weights):
            match = _MEMBER.search(name)
            if match is None or name.replace(match[1], "x_proj") in weights:  # Mamba's gate
                continue
            if self._is_non_gated_moe_weight(name):
                continue
            group = next(group for group in STACKED if match[1] in group)
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
    if part == "q_a_proj":
        return int(config.q_lora_rank)
    if part == "kv_a_proj_with_mqa":
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    if "q_proj" not in (part, like):
        return rows  # k and v have equal sizes, and so have gate and up
    heads: int = config.num_attention_heads
    kv_heads: int = config.num_key_value_heads
    if part == "q_proj":
        return rows * heads // kv_heads
    return rows * kv_heads // heads
