"""Checks LoRA arguments as SGLang does, with and without the variant ``overlap`` of stock."""

import sys
from types import SimpleNamespace

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_elora.stock import variants

if sys.argv[1] == "overlap":
    variants.overlap()
    HookRegistry.apply_hooks()
from sglang.srt.arg_groups import lora_hook


def arguments(**changed):
    fields = {
        "enable_lora": True,
        "enable_lora_overlap_loading": True,
        "max_loras_per_batch": 2,
        "max_loaded_loras": 8,
        "lora_paths": [f"a{i}=/adapters/a{i}" for i in range(8)],
        "lora_backend": "torch_native",
        "lora_target_modules": None,
        "max_lora_rank": None,
        "max_lora_chunk_size": 16,
        "lora_drain_wait_threshold": 0.0,
        "lora_use_virtual_experts": False,
        "speculative_algorithm": None,
        "moe_runner_backend": "auto",
    }
    return SimpleNamespace(**{**fields, **changed})


def refusal(server_args):
    try:
        lora_hook.check_lora_server_args(server_args)
    except AssertionError as error:
        return str(error)
    return None


many = arguments()
refused = refusal(many)
if sys.argv[1] == "overlap":
    assert refused is None, refused
    assert resolving_view(many).enable_lora_overlap_loading is True
else:
    assert "less than or equal to double" in refused, refused
without = arguments(enable_lora_overlap_loading=None)
assert refusal(without) is None
assert resolving_view(without).enable_lora_overlap_loading is False
assert "should not exceed max_loaded_loras" in refusal(arguments(max_loaded_loras=4))
print("checked")
