"""What kinds of layers a model has, from the arguments that SGLang has resolved."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.model_config import AttentionArch, is_hybrid_swa_model

_HYBRIDS = frozenset(
    {
        "FalconH1ForCausalLM",
        "NemotronHForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
"""Model classes some of whose layers have a state in place of KV, and that are served."""


def has_experts(cfg: Any) -> bool:
    """Whether some layers are a mixture of experts."""
    text = model_config_of(cfg).hf_text_config
    kinds = getattr(text, "layers_block_type", None) if text.model_type == "nemotron_h" else None
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    is_mixture = any((getattr(text, name, None) or 1) > 1 for name in counts)
    return is_mixture and (kinds is None or "moe" in kinds)


def has_states(cfg: Any) -> bool:
    """Whether some layers have a state in place of KV."""
    is_ssm = model_config_of(cfg).attention_arch == AttentionArch.SSM
    return bool(cfg.uses_mamba_radix_cache or is_ssm)


def is_served_hybrid(cfg: Any) -> bool:
    return bool(_HYBRIDS.intersection(model_config_of(cfg).hf_config.architectures or ()))


def keeps_whole_windows(cfg: Any) -> bool:
    """Whether layers with sliding windows keep the KV of whole prompts, in the pool of the others:
    with adapters, windows in a pool of their own were not tested with these features."""
    return bool(cfg.enable_hierarchical_cache or cfg.speculative_algorithm)


def has_whole_windows(cfg: Any) -> bool:
    """Whether layers with sliding windows keep the KV of whole prompts, where SGLang would by
    default keep that of the windows only, in a pool of their own."""
    config = model_config_of(cfg)
    has_windows = is_hybrid_swa_model(config.hf_config.architectures, config.hf_text_config)
    return bool(has_windows and cfg.disable_hybrid_swa_memory)


def tells_window_size(cfg: Any) -> bool:
    """Whether SGLang learns the windows' size without a second pool; it would otherwise attend to
    whole prompts in these layers (``resolve_sliding_window_size``)."""
    from sglang.srt.models.registry import ModelRegistry  # imports every model

    config = model_config_of(cfg)
    if config.attention_chunk_size is not None:
        return True
    model, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
    return hasattr(model, "get_attention_sliding_window_size")
