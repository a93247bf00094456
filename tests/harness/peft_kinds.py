"""Adapters of every kind that PEFT saves, written by PEFT itself.

Those for each expert alone are written by hand: PEFT writes such with transformers 4, and loads
them with any.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
from sglang_elora.testbed.noise import noise
from tests.harness.peft_adapters import CONFIG, WEIGHTS

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Options = Mapping[str, Any]

SERVED: Mapping[str, Options] = {
    "plain": {},
    "query": {"target_modules": ["q_proj"]},
    "key-and-up": {"target_modules": ["k_proj", "up_proj"]},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 16, "down_proj": 2, r"layers\.1\.mlp\.up_proj": 24}},
    "alphas": {"alpha_pattern": {"v_proj": 64, r"layers\.0\..*": 4}},
    "both": {"rank_pattern": {"o_proj": 32}, "alpha_pattern": {"o_proj": 8, "gate_proj": 2}},
    "rslora-ranks": {"rank_pattern": {"q_proj": 2, "up_proj": 16}, "use_rslora": True},
    "no-default": {"rank_pattern": dict.fromkeys(_ALL, 4), "r": 64},
    "expression": {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"},
    "all-but": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "o_proj"]},
    "one-layer": {"layers_to_transform": [1], "alpha_pattern": {"k_proj": 40}},
    "copies": {"rank_pattern": {"q_proj": 2}},  # saved with embed_tokens and lm_head
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "velora": {"velora_config": {}},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding-and-all": {
        "target_modules": [*_ALL, "embed_tokens", "lm_head"],
        "rank_pattern": {"embed_tokens": 24, "q_proj": 4},
        "alpha_pattern": {"embed_tokens": 4},
    },
    "head-and-all": {"target_modules": [*_ALL, "lm_head"], "rank_pattern": {"lm_head": 24}},
}
"""Name -> options of ``LoraConfig`` that are not the default."""

REFUSED: dict[str, tuple[Options, str]] = {
    "dora": ({"use_dora": True}, "use_dora is set"),
    "factor-bias": ({"lora_bias": True}, "lora_bias is set"),
    "saved-norm": ({"modules_to_save": ["norm"]}, "fully trained module (modules_to_save)"),
    "saved-head": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is a saved embedding"),
    "tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices is set"),
    "pissa": ({"init_lora_weights": "pissa"}, "changed the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "changed the base weights"),
    "parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
        "target_parameters is set",
    ),
    "kasa": ({"kasa_config": {}}, "kasa_config is set"),
    "monteclora": ({"monteclora_config": {}}, "monteclora_config is set"),
    "blocks": (
        {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "nblocks": 2, "match_strict": False}},
        "use_bdlora is set",
    ),
    "activated-head": (
        {"target_modules": ["q_proj", "lm_head"], "alora_invocation_tokens": [7, 8]},
        "is set, and it has weights for lm_head",
    ),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
}
"""Name -> (options, a part of the reason)."""


_BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SERVED_EXPERTS: Mapping[str, Options] = {
    "experts": {"target_parameters": _BOTH},
    "experts-down": {"target_parameters": ["experts.down_proj"]},
    "experts-up": {"target_parameters": ["gate_up_proj"], "use_rslora": True},
    "experts-one-layer": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "experts-and-all": {
        "target_modules": [*_ATTENTION, "embed_tokens", "lm_head"],
        "target_parameters": _BOTH,
        "rank_pattern": {"q_proj": 2, r".*\.gate_up_proj": 16},
        "alpha_pattern": {"q_proj": 4, r".*\.gate_up_proj": 24},
    },
    "attention": {"target_modules": _ATTENTION},
}
"""As ``SERVED``, for a model with experts."""
EACH_EXPERT = {"each-expert": range(4), "some-experts": (0, 3)}
"""Name -> experts that have matrices of their own, in adapters as of transformers 4."""
REFUSED_EXPERTS: dict[str, tuple[Options, str]] = {
    "router": ({"target_parameters": ["mlp.gate.weight"]}, "target_parameters is set"),
}


def make(checkpoint: Path, folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Write the adapters to subfolders with their names. What was trained is random."""
    ensure_torchvision_importable()
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about what some options mean
        for name in names:
            made[name] = _write(checkpoint, folder, name)
    return made


def make_each_expert(folder: Path, name: str, *, whole: bool = False) -> Path:
    """Write an adapter of ``EACH_EXPERT``; ``whole``: with zeros for all other experts."""
    experts = EACH_EXPERT[name]
    numbers = EACH_EXPERT["each-expert"] if whole else experts
    hidden, inner = 128, 64  # of the family Qwen3-MoE
    tensors = {}
    for layer, expert in product(range(2), numbers):
        for projection in _ALL[4:]:
            sizes = (inner, hidden) if projection == "down_proj" else (hidden, inner)
            path = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
            for side, shape in (("A", (8, sizes[0])), ("B", (sizes[1], 8))):
                key = f"base_model.model.{path}.lora_{side}.weight"
                scale = 0.6 * shape[1] ** -0.5 * (expert in experts)
                tensors[key] = noise(f"{name}/{key}", shape) * scale
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": _ALL[4:]}
    (folder / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder


def _write(checkpoint: Path, folder: Path, name: str) -> Path:
    import peft
    import transformers

    options = _OPTIONS[name]
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    modules = [] if "target_parameters" in options else _ALL
    settings = {"r": 8, "lora_alpha": 16, "target_modules": modules, **options}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            values = noise(f"{name}/{path}", weight.shape)
            if "lora_magnitude" in path:
                weight *= 1 + 0.3 * values
            elif "lora_" in path and weight.dim() == 2:
                weight.copy_(0.6 * values * weight.shape[1] ** -0.5)
            elif "lora_" in path or "trainable_tokens_delta" in path or "modules_to_save" in path:
                weight += 0.3 * values
    model.save_pretrained(str(folder / name), save_embedding_layers=name == "copies" or "auto")
    return folder / name


_OPTIONS = {
    **SERVED,
    **SERVED_EXPERTS,
    **{name: options for name, (options, _) in (REFUSED | REFUSED_EXPERTS).items()},
}
