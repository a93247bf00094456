"""A small random checkpoint of each model family, with adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_elora.testbed.noise import noise
from sglang_elora.testbed.tokenizer import train_tokenizer
from tests.harness.peft_adapters import CONFIG, WEIGHTS
from tests.harness.reference import Reference
from tests.harness.server_flags import HOST_TIER

VOCABULARY = 1024
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
ENCODER = {  # of images
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PARAMETERS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
_RANKS = {
    "rank_pattern": {"q_proj": 2, r".*\.gate_up_proj": 16},
    "alpha_pattern": {"q_proj": 4, r".*\.gate_up_proj": 8},
}
_LATENT_ATTENTION = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """How to make one, and what its adapters target: each entry is one adapter's modules."""

    name: str
    model_type: str
    targets: Mapping[str, Sequence[str] | str] = field(
        default_factory=lambda: {"attention": ATTENTION, "all": (*ATTENTION, *MLP)}
    )
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)  # as ``targets``
    lora_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by adapter
    per_expert: Sequence[str] = ()
    """Paths in a layer of an expert's gate, up and down, as PEFT wrote them with transformers 4;
    an adapter "each expert" has them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the language model's configuration that SGLang reads otherwise than transformers
    writes them."""
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    embedding_std: float = 1.0
    processor: bool = False  # of images, without which SGLang starts no such model
    auto: str = "AutoModelForCausalLM"
    flags: Sequence[str] = ()  # that a server with its adapters needs
    programs: Sequence[str] = ()  # that SGLang compiles something with
    least_cached: int = 300  # prompt tokens that come from the cache
    pool_slots: int = 6000  # too few for many adapters
    differs: bool = False  # from Llama, in more than a detail of attention


MELLUM = Family(
    "Mellum 2",
    "mellum",
    targets={"attention": ATTENTION, "query": ("q_proj",)},
    options={
        "head_dim": 32,
        "num_hidden_layers": 5,
        "sliding_window": 16,
        "layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention"],
        "mlp_layer_types": ["dense"] * 5,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    differs=True,
)
_DRAFTED = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4")

FAMILIES = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", options={"head_dim": 32, "sliding_window": None}),
    Family(
        "Qwen2.5",
        "qwen2",
        targets={
            "head": ("lm_head",),
            "embedding": ("embed_tokens",),
            "tied": ("lm_head",),
            "all": (*ATTENTION, *MLP, "embed_tokens", "lm_head"),
        },
        lora_options={"tied": {"ensure_weight_tying": True}},
        options={"tie_word_embeddings": True},
        embedding_std=0.3,  # it is the output layer, too
        differs=True,
    ),
    Family("Qwen3", "qwen3", options={"head_dim": 32}),
    Family(
        "Gemma 3",
        "gemma3_text",
        refused={"embedding": ("embed_tokens",), "head": ("lm_head",)},
        options={
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
        flags=("--lora-target-modules", "all", "--max-lora-rank", "8"),
        embedding_std=0.02,  # it is scaled up, and is the output layer too: or tokens repeat
        differs=True,
    ),
    MELLUM,
    replace(
        MELLUM,
        name="Mellum 2, drafted n-grams",
        flags=_DRAFTED,
        programs=("g++", "ninja"),
        differs=False,
    ),
    Family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        targets={"attention": ATTENTION, "query": ("q_proj",)},  # no module of the image encoder
        sizes={},
        options={
            "text_config": {
                **SIZES,
                "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            },
            "vision_config": ENCODER,
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
        processor=True,
    ),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        targets={"attention": ATTENTION, "experts": (), "all": ATTENTION},
        lora_options={"experts": PARAMETERS, "all": {**PARAMETERS, **_RANKS}},
        per_expert=[f"mlp.experts.{{}}.{projection}" for projection in MLP],
        options={
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
        flags=(
            *("--lora-target-modules", "all", "--max-lora-rank", "16"),
            *("--max-total-tokens", "1200", "--elora-check-streams", "latest"),
        ),
        least_cached=50,
        differs=False,  # test_peft_options.py serves more kinds of it
    ),
    Family(
        "Mixtral",
        "mixtral",
        targets={"attention": ATTENTION, "experts": (), "down": ()},
        lora_options={"experts": PARAMETERS, "down": {"target_parameters": ["experts.down_proj"]}},
        per_expert=[f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")],
        options={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        flags=("--lora-target-modules", "all", "--max-lora-rank", "16"),
    ),
    Family(
        "GLM 4.5",
        "glm4_moe",
        targets={"attention": ATTENTION, "shared": MLP, "all": (*ATTENTION, *MLP)},
        lora_options={"all": PARAMETERS},
        options={
            "head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,  # the first layer has no experts
        },
        flags=("--lora-target-modules", "all", "--max-lora-rank", "16"),
    ),
    Family(
        "DeepSeek V3",
        "deepseek_v3",
        targets={
            "attention": _LATENT_ATTENTION,
            "a part": ("kv_a_proj_with_mqa", "o_proj"),
            "queries": ("q_a_proj", "q_b_proj"),
            "MLP": MLP,
            "experts": ("o_proj", "down_proj"),
        },
        lora_options={"experts": PARAMETERS},
        refused={"latent": ("q_a_proj", "kv_b_proj")},
        options={
            "num_key_value_heads": 4,
            "q_lora_rank": 48,
            "kv_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "n_group": 2,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "topk_group": 2,
            "moe_layer_freq": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        flags=(
            *("--lora-target-modules", *_LATENT_ATTENTION, *MLP),
            *("--max-total-tokens", "1200", *HOST_TIER, "write_back"),  # room for two adapters
            *("--elora-check-streams", "latest"),
        ),
        least_cached=50,
        differs=True,
    ),
    Family(
        "Phi-4",
        "phi3",
        targets={"attention": ("qkv_proj", "o_proj"), "MLP": ("gate_up_proj", "down_proj")},
        options={"bos_token_id": 1, "eos_token_id": 2},
        differs=True,
    ),
)


@dataclass(frozen=True)
class Made:
    """A checkpoint and its adapters, those that are served and those that are refused."""

    checkpoint: Path
    adapters: Mapping[str, Path]
    refused: Mapping[str, Path]
    family: Family

    def reference(self) -> Reference:
        return Reference(self.checkpoint, self.adapters, self.family.auto)


def make_family(family: Family, folder: Path) -> Made:
    """Write a checkpoint and its adapters to a new folder."""
    import transformers
    from peft import LoraConfig, get_peft_model

    checkpoint = folder / "checkpoint"
    tokenizer = train_tokenizer(VOCABULARY, seed=0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(
        family.model_type, **{**family.sizes, **ids, "dtype": "float32", **family.options}
    )
    model = getattr(transformers, family.auto).from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random(name, weight.shape))
            if "embed" in name:
                weight *= family.embedding_std
    model.tie_weights()
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    if family.stored:
        path = checkpoint / "config.json"
        settings = json.loads(path.read_text())
        text = settings.get("text_config", settings)
        text.update(family.stored)
        for key in [key for key, value in text.items() if value is None]:
            del text[key]
        path.write_text(json.dumps(settings))
    if family.processor:
        _save_processor(tokenizer, checkpoint)
    adapters = {}
    for name, modules in {**family.targets, **family.refused}.items():
        wanted = modules if isinstance(modules, str) else list(modules)
        options = {"r": 8, "lora_alpha": 16, **family.lora_options.get(name, {})}
        lora = LoraConfig(target_modules=wanted, task_type="CAUSAL_LM", **options)
        adapted = get_peft_model(model, lora)
        with torch.no_grad():
            for path, weight in adapted.named_parameters():
                if "lora_" in path:
                    weight.copy_(_random(f"{name}/{path}", weight.shape) * 0.5)
        adapters[name] = folder / name
        adapted.save_pretrained(str(adapters[name]))
        model = adapted.unload()
    served = {name: adapters[name] for name in family.targets}
    if family.per_expert:
        served["each expert"] = folder / "each expert"
        _save_each_expert(family, config, served["each expert"])
    return Made(checkpoint, served, {name: adapters[name] for name in family.refused}, family)


def _save_each_expert(family: Family, config: Any, folder: Path) -> None:
    """Write an adapter with a matrix for each expert and projection."""
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for expert in range(num_experts):
            for i, path in enumerate(family.per_expert):
                sizes = (config.hidden_size, inner) if i < 2 else (inner, config.hidden_size)
                stem = f"base_model.model.model.layers.{layer}.{path.format(expert)}"
                for side, shape in (("A", (8, sizes[0])), ("B", (sizes[1], 8))):
                    name = f"{stem}.lora_{side}.weight"
                    tensors[name] = _random(name, shape) * 0.5
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16}
    modules = [path.rsplit(".", 1)[-1] for path in family.per_expert]
    (folder / CONFIG).write_text(json.dumps({**settings, "target_modules": modules}))


def _save_processor(tokenizer: Any, folder: Path) -> None:
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    parts = (Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
    Qwen2_5_VLProcessor(*parts, chat_template="{{ messages }}").save_pretrained(folder)


def _random(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Noise that depends on the name only, strong enough that answers differ."""
    values = noise(name, shape)
    if "norm" in name:
        return 1 + 0.1 * values
    if len(shape) == 1:
        return 0.1 * values
    gain = 3.0 if "lm_head" in name else 1.5
    return values * (1.0 if "embed" in name else gain * shape[-1] ** -0.5)
