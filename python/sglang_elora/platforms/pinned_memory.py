"""Plain memory where SGLang asks for pinned memory.

SGLang's LoRA code and the HiCache host pool pin memory without asking the
platform. Pinning needs an accelerator; torch raises without one. On the CPU
platform host and device memory are the same, so plain memory serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros")


def use_plain_memory() -> None:
    """Make torch ignore requests for pinned memory in this process. Idempotent."""
    if hasattr(torch.empty, "__wrapped__"):
        return
    for name in _FACTORIES:
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = _unpinned

    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS, alloc_with_pin_memory

    ALLOC_MEMORY_FUNCS["cpu"] = alloc_with_pin_memory


def _without_pinning(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def plain(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return plain


def _unpinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    return self
