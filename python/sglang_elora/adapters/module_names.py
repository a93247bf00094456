"""Module names as SGLang groups them into fused layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# Checkpoint name -> the name that --lora-target-modules and the adapter memory use: SGLang runs
# several projections as one fused layer.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",  # Mixtral's gate, up and down projections
    "w3": "gate_up_proj",
    "w2": "down_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
    "in_proj_qkv": "in_proj_qkvz",  # Qwen3.5's linear attention
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
    "vocab_emb": "embed_tokens",
    "embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
    "output": "lm_head",
    "unembed_tokens": "lm_head",
}
_DOT = re.compile(r"\.")

EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
"""The embedding and the output layer, as modules of a checkpoint are named."""


def served_name(path: str) -> str:
    """The served name of a module given by its path, its leaf name, or its served name."""
    leaf = path.rsplit(".", 1)[-1]
    return _FUSED.get(leaf, leaf)


def endings(path: str) -> Iterator[str]:
    """The path and its last components: all names that match the path by PEFT's rule."""
    yield path
    for dot in _DOT.finditer(path):
        yield path[dot.end() :]


def served_names(paths: Iterable[str]) -> frozenset[str]:
    return frozenset(served_name(path) for path in paths)
