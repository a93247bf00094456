"""Unpinned memory and torch copies for SGLang code that assumes an accelerator.

SGLang's LoRA code and the HiCache host pool pin memory without asking the
platform, and HiCache copies with a compiled kernel. Pinning needs an
accelerator; torch raises without one. On the CPU platform host and device
memory are the same, so unpinned memory and torch's indexing are used instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


def use_plain_host_tier() -> None:
    """Let HiCache's host pools allocate and copy without an accelerator."""
    from sglang.srt.mem_cache.pool_host import common, mha, mla

    common.ALLOC_MEMORY_FUNCS["cpu"] = common.alloc_with_pin_memory
    mha.transfer_kv_direct = transfer_kv_direct
    mla.transfer_kv_direct = transfer_kv_direct


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],  # each [slots, ...]
    dst_layers: Sequence[torch.Tensor],  # each [slots, ...], same trailing shape
    src_indices: torch.Tensor,  # int64 [tokens]
    dst_indices: torch.Tensor,  # int64 [tokens]
    page_size: int,
) -> None:
    """Copy slots between device and host pools, layer by layer.

    Stands in for ``sgl_kernel.kvcacheio.transfer_kv_direct``, which copies page by page.
    """
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def _without_pinning(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def plain(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return plain


def _unpinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    return self
