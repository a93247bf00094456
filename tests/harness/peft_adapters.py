"""Adapters of tiny models, written by peft itself, and ways to edit them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sglang_elora.adapters import (  # noqa: E402
    AdapterError,
    BaseShapes,
    check_adapter,
)
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()
pytest.importorskip("peft")

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, RANK = 64, 96, 2, 128, 4
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Tensors = dict[str, Any]


def tiny_config(family: str, **changes: Any) -> Any:
    import transformers

    sizes = SIZES | changes
    if family == "Qwen2":
        sizes.pop("head_dim", None)
    return getattr(transformers, family + "Config")(**sizes)


def save_adapter(
    folder: Path,
    family: str = "Llama",
    sizes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Path:
    """Write an adapter with non-zero B by peft's own save_pretrained."""
    import peft
    import transformers

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **sizes))
    settings = {"r": RANK, "lora_alpha": 8, "target_modules": ALL_LINEAR} | options
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dtype.is_floating_point:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return folder


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(adapter: Path, change: Callable[[Tensors], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(adapter / WEIGHTS))
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, str(adapter / WEIGHTS))


def refusal(adapter: Path | str, base: BaseShapes, **limits: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        check_adapter("alice", str(adapter), base, **limits)
    text = str(caught.value)
    assert text.startswith("LoRA adapter 'alice' (")
    assert text.endswith(".") and ".." not in text.replace("...", "")
    return text


def assert_in(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"
