"""Importing this imports what SGLang imports of others: most of what a start of a server takes.

Nothing of SGLang or of this package: which of their modules are imported, and when, is for the
server to say.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

_LIBRARIES = (
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor"),
    *("transformers.models.auto", "transformers.processing_utils", "transformers.masking_utils"),
    *("openai", "openai.types.responses", "fastapi.openapi.models", "uvicorn", "aiohttp", "zmq"),
    *("scipy.special", "xgrammar", "numba", "pydantic_extra_types.language_code", "sympy"),
    *("httpx", "msgspec", "networkx", "peft"),
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ensure_torchvision_importable()
    for _name in _LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(_name)
