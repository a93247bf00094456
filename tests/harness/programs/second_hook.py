"""Calls a method of SGLang's that our plugin and another one have hooked."""

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from sglang.srt.plugins import load_plugins

load_plugins()
from types import SimpleNamespace

import torch
from sglang.srt.lora.lora import LoRAAdapter

weights = {
    "model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 4),
    "model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(8, 2),
}
adapter = SimpleNamespace(
    layers=[SimpleNamespace(weights=weights)],
    base_hf_config=None,
    base_model=None,
    _is_non_gated_moe_weight=lambda name: False,
)
try:
    LoRAAdapter._normalize_weights(adapter)
except AttributeError as error:
    print("original ran:", error)
print(sorted(name.split(".")[4] for name in weights if "lora_A" in name))
