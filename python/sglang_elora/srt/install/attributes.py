"""The private names of SGLang that this package uses outside hooks and overrides.

Nothing promises that they stay. The list is checked before a start, so that a release of SGLang
without one of them ends with a text that names it, and a test compares it with the source.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from typing import Any

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sglang.srt.entrypoints.anthropic.serving.AnthropicServing": ("_error_response",),
    "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase": ("_resolve_lora_path",),
    "sglang.srt.lora.lora_manager.LoRAManager": ("_use_cuda_graph_batch",),
    "sglang.srt.lora.lora.LoRAAdapter": ("_is_non_gated_moe_weight",),
    "sglang.srt.lora.layers.FusedMoEWithLoRA": ("_lora_runner", "_quant_info"),
    "sglang.srt.lora.mem_pool.LoRAMemoryPool": (
        "_get_num_local_experts",
        "_has_moe_module",
    ),
    "sglang.srt.lora.lora_registry.LoRARegistry": ("_register_adapter",),
    "sglang.srt.managers.scheduler.Scheduler": ("_engine_paused", "_release_aborted_request"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager": (
        "_async_dispatch_to_scheduler",
        "_dispatch_to_scheduler",
    ),
    "sglang.srt.mem_cache.unified_cache.components.full.FullComponent": ("_full_kv_pool_host",),
    "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore": (
        "_build_backup_kv_action",
        "_collect_all_nodes",
        "_delete_unbacked_device_leaf",
        "_demote",
        "_empty_match_result",
        "_evict_host_leaf",
        "_register_node",
        "_release_all_component_layers",
        "_remove_leaf_from_parent",
        "_update_evictable_leaf_sets",
    ),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache": (
        "_all_reduce",
        "_apply_eviction_result",
        "_execute_and_commit_kv_backup",
    ),
    "sglang.srt.arg_groups.pipeline": ("_raw_input",),  # set there, of ``ServerArgs``
}
"""Class -> its methods, or attributes that its module sets; or a module that sets them."""


def attribute_problems() -> list[str]:
    """Each listed name that its class does not have."""
    problems = []
    for path, names in ATTRIBUTES.items():
        try:
            cls = pkgutil.resolve_name(path)
        except (AttributeError, ImportError) as error:
            problems.append(f"{path} is not there: {error}")
            continue
        problems += [f"{path}.{name} is not there" for name in names if not _has(cls, name)]
    return problems


def _has(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    sets = re.compile(rf"\w\.{name}\b\s*(:[^=\n]+)?=[^=]")
    bases = [base.__module__ for base in getattr(owner, "__mro__", ()) if base is not object]
    modules = [sys.modules[module] for module in bases] or [owner]
    return any(sets.search(inspect.getsource(module)) for module in modules)
