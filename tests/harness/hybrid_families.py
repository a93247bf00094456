"""Families whose layers are not all alike: as ``model_families``, in a file of their own."""

from __future__ import annotations

from dataclasses import replace

from tests.harness.model_families import ATTENTION, ENCODER, MELLUM, MLP, PARAMETERS, SIZES, Family

_PATTERN = "M-M*M-M*-"  # Mamba, MLP, attention
_STATE_INPUTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_QWEN3_5 = Family(
    "Qwen3.5",
    "qwen3_5_text",
    targets={
        "attention": ATTENTION,
        "linear attention": (*_STATE_INPUTS, "out_proj"),
        "a part": ("q_proj", "in_proj_z", "in_proj_a"),
        "qkv": ("k_proj", "in_proj_qkv"),
        "MLP": MLP,
        "all": "all-linear",
    },
    options={
        "head_dim": 32,
        "num_hidden_layers": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    },
    stored={"full_attention_interval": 4},
)
HYBRIDS = (
    _QWEN3_5,
    replace(
        _QWEN3_5,
        name="Qwen3.5 with experts",
        model_type="qwen3_5_moe_text",
        targets={
            "attention": ATTENTION,
            "experts": ("o_proj",),
            "shared": MLP,
            "all": (*ATTENTION, *MLP, "in_proj_z", "out_proj"),
        },
        lora_options={"experts": PARAMETERS, "all": PARAMETERS},
        options={
            **_QWEN3_5.options,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    replace(
        _QWEN3_5,
        name="Qwen3.5 with an image encoder",
        model_type="qwen3_5",
        targets={name: kinds for name, kinds in _QWEN3_5.targets.items() if name != "all"},
        sizes={},
        options={
            "text_config": {
                **SIZES,
                **_QWEN3_5.options,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {**ENCODER, "num_position_embeddings": 16},
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
        processor=True,
    ),
    Family(
        "Nemotron-H",
        "nemotron_h",
        targets={
            "attention": ATTENTION,
            "Mamba": ("in_proj",),  # PEFT refuses out_proj
            "a part": ("q_proj", "in_proj"),
            "kv": ("k_proj", "v_proj", "down_proj"),
            "MLP": ("up_proj", "down_proj"),
            "all": (*ATTENTION, "in_proj", "up_proj", "down_proj"),
        },
        options={
            "hybrid_override_pattern": _PATTERN,
            "num_hidden_layers": len(_PATTERN),
            "head_dim": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 64,
        },
        stored={
            "hybrid_override_pattern": _PATTERN,
            "layers_block_type": None,
            "mamba_n_groups": 2,
            "mtp_layers_block_type": None,
        },
    ),
    Family(
        "Falcon-H1",
        "falcon_h1",
        targets={
            "attention": ATTENTION,
            "Mamba": ("in_proj",),
            "a part": ("v_proj", "in_proj"),
            "kv": ("k_proj", "v_proj", "up_proj"),
            "MLP": MLP,
            "all": (*ATTENTION, *MLP, "in_proj"),
        },
        options={
            "head_dim": 32,
            "num_hidden_layers": 3,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
            "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3],
        },
    ),
)
"""Families with layers that have a state in place of KV."""

_PARTS_OF_ATTENTION = {
    "attention": ATTENTION,
    "query": ("q_proj",),
    "kv": ("k_proj", "v_proj"),
    "a part": ("v_proj", "o_proj"),
    "output": ("o_proj",),
    "inputs": ("q_proj", "k_proj", "v_proj"),
}
WINDOWED = (
    replace(MELLUM, targets=_PARTS_OF_ATTENTION),
    Family(
        "gpt-oss",
        "gpt_oss",
        targets=_PARTS_OF_ATTENTION,
        options={
            "head_dim": 32,
            "num_hidden_layers": 4,
            "intermediate_size": 64,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        pool_slots=2500,
    ),
)
"""Families with layers that attend to a sliding window."""
