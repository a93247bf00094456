"""Hook bodies that make SGLang's outputs equal to PEFT's for some kinds of adapters.

Three PEFT features load without an error in SGLang 0.5.23 but give different outputs:
rank-stabilised scaling, ranks and scalings by module, and adapters on part of a fused projection.
Weights for Qwen3.5's linear attention, as PEFT names them, are left out without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.utils import get_layer_id

from sglang_elora.adapters import (
    STACKED,
    is_tower,
    needs_one_rank,
    one_rank_config,
    served_name,
    stored_shapes,
)
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
    if self.path is not None and (needs_one_rank(self.hf_config) or may_drop):
        shapes = stored_shapes(self.path, self.path)
        self.elora_stored = self.hf_config
        self.hf_config = one_rank_config(self.path, self.hf_config, shapes)
        self.r, self.lora_alpha = self.hf_config["r"], self.hf_config["lora_alpha"]
        self.target_modules = self.hf_config["target_modules"]
    if isinstance(self.target_modules, list):  # SGLang knows all other names
        named = (n.rsplit(".", 1)[-1].startswith("in_proj_") for n in self.target_modules)
        self.target_modules = [
            served_name(name) if is_input else name
            for name, is_input in zip(self.target_modules, named, strict=True)
        ]


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
    for number, layer in enumerate(self.layers):
        weights = layer.weights
        for name in list(weights):
            match = _MEMBER.search(name)
            if match is None or name.replace(match[1], "x_proj") in weights:  # Mamba's gate
                continue
            if self._is_non_gated_moe_weight(name):
                continue
            if match[1] == "up_proj" and number in _layers_without_gate(self.base_model):
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
        _stack_linear_attention(weights, self.base_hf_config)


def _stack_linear_attention(weights: dict[str, torch.Tensor], config: Any) -> None:
    """Name the input projections of Qwen3.5's linear attention as SGLang does: q, k and v, which
    have one A in PEFT, as three, and b and a as one."""
    for name in list(weights):
        if ".in_proj_qkv." in name:
            weight = weights.pop(name)
            key = config.linear_num_key_heads * config.linear_key_head_dim
            parts = (weight,) * 3
            if ".lora_B." in name:
                parts = weight.split((key, key, len(weight) - 2 * key))
            for letter, part in zip("qkv", parts, strict=True):
                weights[name.replace("in_proj_qkv", f"in_proj_{letter}")] = part
        elif ".in_proj_b." in name:
            pair = weights.pop(name), weights.pop(name.replace("in_proj_b", "in_proj_a"))
            weights[name.replace("in_proj_b", "in_proj_ba")] = torch.cat(pair)


def stacked_parts(original: Callable[..., int], module_name: str, *args: Any) -> int:
    """The number of parts of a stacked module, each with an A. Runs around
    ``get_stacked_multiply``, which does not know in_proj_ba, nor PEFT's adapters of in_proj."""
    own = {"in_proj_ba": 2, "in_proj": 1}.get(module_name)
    return original(module_name, *args) if own is None else own


def add_undetected(result: set[str], model: torch.nn.Module) -> set[str]:
    """The modules of a model that adapters may have weights for. Runs after
    ``auto_detect_lora_target_modules``, which does not know in_proj_ba."""
    has_it = any(path.endswith(".in_proj_ba") for path, _ in model.named_modules())
    return result | {"in_proj_ba"} if has_it else result


@lru_cache(maxsize=1)
def _layers_without_gate(model: torch.nn.Module | None) -> frozenset[int]:
    """The layers of a model whose MLP has an ``up_proj`` of its own."""
    paths = () if model is None else (path for path, _ in model.named_modules())
    own = (path for path in paths if path.endswith(".up_proj") and not is_tower(path))
    layers = map(get_layer_id, own)
    return frozenset(layer for layer in layers if layer is not None)


def _out_features(config: Any, part: str, *, like: str, rows: int) -> int:
    """Output size of projection ``part``, given that of its sibling ``like``."""
    if part == "q_a_proj":
        return int(config.q_lora_rank)
    if part == "kv_a_proj_with_mqa":
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    if part.startswith("in_proj_"):
        return _inputs_of_linear_attention(config)[part]
    if "q_proj" not in (part, like):
        return rows  # k and v have equal sizes, and so have gate and up
    heads: int = config.num_attention_heads
    if str(getattr(config, "model_type", "")).startswith("qwen3_5"):
        heads *= 1 + getattr(config, "attn_output_gate", True)  # as SGLang's model class has it
    kv_heads: int = config.num_key_value_heads
    if part == "q_proj":
        return rows * heads // kv_heads
    return rows * kv_heads // heads


def _inputs_of_linear_attention(config: Any) -> dict[str, int]:
    """Output sizes of the input projections of Qwen3.5's linear attention."""
    heads: int = config.linear_num_value_heads
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value = heads * config.linear_value_head_dim
    both = {"in_proj_qkv": 2 * key + value, "in_proj_z": value}
    return both | dict.fromkeys(("in_proj_b", "in_proj_a"), heads)
