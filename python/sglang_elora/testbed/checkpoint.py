"""A small random-weight model in Hugging Face format with varied greedy output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
from sglang_elora.testbed.build_once import build_once
from sglang_elora.testbed.noise import noise
from sglang_elora.testbed.tokenizer import speakable_token_ids, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen2", "qwen3"]
Dtype = Literal["float32", "bfloat16", "float16"]

_FORMAT = 2  # increment when the same parameters yield different bytes
_GAIN = {  # weight std = gain / sqrt(fan_in); tuned for varied greedy output, see _random_weight
    "q_proj": 1.5,
    "k_proj": 1.5,
    "v_proj": 1.0,
    "o_proj": 2.0,
    "gate_proj": 1.0,
    "up_proj": 1.0,
    "down_proj": 2.0,
    "embed_tokens": 1.0,
    "lm_head": 3.0,
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of the decoder; the defaults give 4 million parameters."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 2048
    max_position: int = 8192

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"num_heads * head_dim = {self.num_heads} * {self.head_dim} must equal "
                f"hidden_size={self.hidden_size}: Qwen2 has no head_dim of its own"
            )


def make_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    architecture: Architecture = "llama",
    dtype: Dtype = "float32",
    shape: ModelShape | None = None,
) -> Path:
    """Write the checkpoint to ``directory`` unless it exists there, and return its path.

    It has a config, safetensors weights, a tokenizer with chat template, and a generation config
    without sampling. The same arguments yield the same bytes.

    Raises:
        ValueError: ``directory`` has content that the demo did not write.
    """
    resolved = shape or ModelShape()
    parameters = {
        "kind": "checkpoint",
        "format": _FORMAT,
        "seed": seed,
        "architecture": architecture,
        "dtype": dtype,
        "shape": asdict(resolved),
    }

    def build(draft: Path) -> None:
        _write(draft, seed, architecture, dtype, resolved)

    return build_once(directory, parameters, build)


def silence_progress_bars() -> None:
    """Disable transformers' progress bars for loading models in this process."""
    ensure_torchvision_importable()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]


def _write(
    directory: Path, seed: int, architecture: Architecture, dtype: Dtype, shape: ModelShape
) -> None:
    ensure_torchvision_importable()
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = train_tokenizer(shape.vocab_size, seed)
    config = _config(architecture, dtype, shape, tokenizer)
    causal_lm: Any = AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = causal_lm.from_config(config)
    config.architectures = [type(skeleton).__name__]
    weights = {
        name: _random_weight(name, like.shape, seed)
        for name, like in sorted(skeleton.state_dict().items())
    }
    _silence(weights["lm_head.weight"], keep=speakable_token_ids(tokenizer))
    save_file(
        {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(directory)


def _config(
    architecture: Architecture,
    dtype: Dtype,
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerFast,
) -> PreTrainedConfig:
    from transformers import AutoConfig

    own_head_dim = {} if architecture == "qwen2" else {"head_dim": shape.head_dim}
    return AutoConfig.for_model(
        architecture,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
        **own_head_dim,
    )


def _random_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Initial value of one parameter, from its own generator, so that order does not matter.

    Projections scale the variance of their input by gain squared. With gains near 1, attention
    and MLP outputs are as large as the residual stream: each generated token then depends on the
    whole context. If it depended on the last token alone, the output would soon repeat.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    values = noise(f"{seed}/{name}", shape)
    if name.endswith(".bias"):
        return values.mul_(0.1)
    gain = _GAIN[name.split(".")[-2]]
    fan_in = 1 if "embed_tokens" in name else shape[-1]
    return values.mul_(gain * fan_in**-0.5)


def _silence(lm_head: torch.Tensor, keep: list[int]) -> None:
    """Zero the rows of all tokens except ``keep``, so that greedy decoding never chooses them:
    their logit is 0, and the maximum of hundreds of random logits is larger.

    ``lm_head``: [vocab_size, hidden_size], changed in place. As the end token is silenced too,
    every answer has the requested length.
    """
    silent = torch.ones(lm_head.shape[0], dtype=torch.bool)
    silent[keep] = False
    lm_head[silent] = 0.0
