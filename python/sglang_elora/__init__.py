"""sglang_elora: one cache for LoRA adapters and KV, as a plugin of SGLang.

Importing this package imports neither torch nor sglang.
"""

from __future__ import annotations

__all__ = ["SGLANG_PIN", "EloraConfig", "__version__"]

from sglang_elora.config import SGLANG_PIN, EloraConfig

__version__ = "0.1.0"
