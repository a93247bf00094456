"""Adapters of tiny models with MoE experts, in both forms in which PEFT stores them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from sglang_elora.adapters import one_rank_config, one_rank_tensors
from tests.harness.peft_adapters import CONFIG, HIDDEN, LAYERS, RANK, SIZES, WEIGHTS, Tensors

EXPERTS, INNER = 4, 24
FAMILIES = ("Qwen3Moe", "Qwen2Moe", "Mixtral")
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model."
EXPERTS0 = f"{PREFIX}model.layers.0.mlp.experts"
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER},
    "Qwen2Moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": 40,
    },
    "Mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INNER},
}


def moe_config(family: str) -> Any:
    sizes = {**SIZES, "num_experts_per_tok": 2, **_OPTIONS[family]}
    if family == "Qwen2Moe":
        del sizes["head_dim"]
    return getattr(transformers, f"{family}Config")(**sizes)


def moe_model(family: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(moe_config(family))


def save_fused(folder: Path, family: str = "Qwen3Moe", **options: Any) -> Path:
    """Write an adapter with ``target_parameters`` by PEFT's own save_pretrained."""
    torch.manual_seed(0)
    settings = {"r": RANK, "lora_alpha": 8, "target_modules": [], "target_parameters": BOTH}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(moe_model(family), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return folder


def save_single(
    folder: Path,
    family: str = "Qwen3Moe",
    *,
    experts: Iterable[int] = range(EXPERTS),
    projections: Iterable[str] = ("gate_proj", "up_proj", "down_proj"),
    **options: Any,
) -> Path:
    """Write an adapter as PEFT with transformers 4 does: factors of each expert by its own name."""
    old = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if family == "Mixtral" else {}
    block = "block_sparse_moe" if old else "mlp"
    torch.manual_seed(0)
    tensors, projections = {}, list(projections)
    for layer in range(LAYERS):
        for expert in experts:
            for name in projections:
                sizes = (INNER, HIDDEN) if name == "down_proj" else (HIDDEN, INNER)
                path = (
                    f"{PREFIX}model.layers.{layer}.{block}.experts.{expert}.{old.get(name, name)}"
                )
                tensors[f"{path}.lora_A.weight"] = 0.1 * torch.randn(RANK, sizes[0])
                tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(sizes[1], RANK)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    config["target_modules"] = [old.get(name, name) for name in projections]
    (folder / CONFIG).write_text(json.dumps(config | options))
    return folder


def stored(folder: Path) -> tuple[dict[str, Any], Tensors]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def deltas_of_peft(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, by module, and for a parameter of experts by path and expert
    (``layers.0.mlp.experts.3.down_proj``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(moe_model(family), str(folder))
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        path, delta = path.removeprefix(PREFIX), module.get_delta_weight("default").detach()
        if parameter := getattr(module, "parameter_name", None):
            path = path.replace(".base_layer", "")
            found |= {f"{path}.{e}.{parameter}": part for e, part in enumerate(delta)}
        else:
            found[path] = delta
    return found


def deltas_as_served(folder: Path) -> dict[str, torch.Tensor]:
    """As ``deltas_of_peft``, of the tensors that SGLang's LoRAAdapter gets.

    Gate and up of an expert are stacked as SGLang does it, with zeros for the one that is missing.
    """
    raw, tensors = stored(folder)
    config = one_rank_config("a", raw, {key: tuple(t.shape) for key, t in tensors.items()})
    made = one_rank_tensors("a", raw, tensors)
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    found: dict[str, torch.Tensor] = {}
    for key, a in made.items():
        if ".lora_A." not in key:
            continue
        b = made[key.replace(".lora_A.", ".lora_B.")]
        assert len(a) == b.shape[1] == rank
        path = key.removeprefix(PREFIX).split(".lora_A.")[0].replace("block_sparse_moe", "mlp")
        found[path] = scaling * (b @ a)
    for path in list(found):
        match = re.fullmatch(r"(.+\.experts\.\d+)\.(gate|up)_proj", path)
        if match is not None:
            half = found.pop(path)
            rest = torch.zeros_like(half)
            both = found.setdefault(f"{match[1]}.gate_up_proj", torch.cat([rest, rest]))
            both[: len(half)] += half if match[2] == "gate" else rest
            both[len(half) :] += half if match[2] == "up" else rest
    return found
