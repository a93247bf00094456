"""Reference implementations of the kernels in plain torch, for tests."""

from __future__ import annotations

__all__ = [
    "lora_expand",
    "lora_logits",
    "lora_lookup",
    "lora_shrink",
    "page_copy",
    "routed_tiles",
]

from sglang_elora.kernels.reference.lora_expand import lora_expand
from sglang_elora.kernels.reference.lora_logits import lora_logits
from sglang_elora.kernels.reference.lora_lookup import lora_lookup
from sglang_elora.kernels.reference.lora_shrink import lora_shrink
from sglang_elora.kernels.reference.page_copy import page_copy
from sglang_elora.kernels.reference.routed_tiles import routed_tiles
