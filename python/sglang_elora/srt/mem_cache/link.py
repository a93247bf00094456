"""Hook bodies of the emulated host-device link (CPU only; with stock SGLang or with ELORA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import allocate_distinct_stream

from sglang_elora.config import EloraConfig
from sglang_elora.platforms.emulated_link import Direction, Link

if TYPE_CHECKING:
    from sglang.srt.lora.lora_overlap_loader import LoRAOverlapLoader
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine
    from sglang.srt.mem_cache.pool_host.base import HostKVCache


def use_emulated_link(config: EloraConfig) -> None:
    """Replace torch's CPU streams and events by those of an emulated link."""
    link = Link(
        config.link_gbytes_per_s * 1e9,
        config.link_latency_us * 1e-6,
        to_host_bytes_per_s=config.link_to_host_gbytes_per_s * 1e9 or None,
    )
    link.install(torch.cpu)


def delay_adapter_copy(buffer_view: torch.Tensor, weight: torch.Tensor) -> None:
    """Delay a copy of an adapter's matrix into SGLang's own LoRA pool; runs before each copy."""
    _link().copy(buffer_view.nbytes)


def make_copy_stream(device_module: Any, avoid: Sequence[Any]) -> Any:
    """A stream for copies from the host that differs from all of ``avoid``.

    torch assigns 32 CUDA streams round robin, so a new one may be one of them. On an emulated link
    the stream does not block.
    """
    if all(hasattr(stream, "cuda_stream") for stream in avoid):
        return allocate_distinct_stream(device_module, avoid)
    stream = device_module.Stream()
    if hasattr(stream, "asynchronous"):
        stream.asynchronous = True
    return stream


def delay_page_copy(num_bytes: int) -> None:
    """Delay a copy from the host to pages, if a link is emulated; runs before the copy."""
    link = getattr(torch.cpu.current_stream(), "link", None)
    if link is not None:
        link.copy(num_bytes)


def delay_kv_load(
    self: HostKVCache, device_pool: Any, host_indices: torch.Tensor, *_: Any, **__: Any
) -> None:
    """Delay a copy of one layer's KV from host to device; runs before each copy.

    ``host_indices`` is int64 ``[tokens]``; ``size_per_token`` counts all layers.
    """
    _link().copy(len(host_indices) * self.size_per_token // self.layer_num)


def delay_kv_backup(
    self: HostKVCache, device_pool: Any, host_indices: torch.Tensor, *_: Any, **__: Any
) -> None:
    """Delay a copy of KV from device to host, which is one copy per layer; runs before it."""
    for _layer in range(self.layer_num):
        num_bytes = len(host_indices) * self.size_per_token // self.layer_num
        _link().copy(num_bytes, Direction.TO_HOST)


def mark_kv_streams(result: None, self: L2TransferEngine, io_backend: str) -> None:
    self.host_to_device_stream.asynchronous = True
    self.device_to_host_stream.asynchronous = True


def mark_adapter_stream(result: None, self: LoRAOverlapLoader, lora_manager: Any) -> None:
    self.load_stream.asynchronous = True


def _link() -> Link:
    stream: Any = torch.cpu.current_stream()
    link: Link = stream.link
    return link
