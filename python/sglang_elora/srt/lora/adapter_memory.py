"""Allocation of the host memory for adapters, at the start of the server."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_bytes
from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator, alloc_with_host_register

from sglang_elora.pages import (
    AdapterLayout,
    HostArena,
    HostMemoryFull,
    block_bytes_for,
    lazy_memory,
)

if TYPE_CHECKING:
    from sglang_elora.srt.lora.lora_manager import EloraLoRAManager

logger = logging.getLogger(__name__)


def arena_for(manager: EloraLoRAManager, budget_bytes: int, device: str) -> HostArena:
    """An arena of whole blocks within the budget, for adapters of the manager's model.

    On CUDA its memory is page-locked now, so that no memory is page-locked while batches run. On
    other devices memory is allocated when adapters are loaded.

    Raises:
        HostMemoryFull: It exceeds this process's share of the machine's free memory, minus
            SGLang's reserve for the system, or it cannot be page-locked.
    """
    plan = manager.memory_pool.plan
    layout = AdapterLayout.build(1, plan.shapes)
    rank_bytes = plan.num_layers * sum(layout.plane_elems) * manager.dtype.itemsize
    block_bytes = block_bytes_for(rank_bytes)
    num_bytes = budget_bytes // block_bytes * block_bytes
    if torch.device(device).type != "cuda":
        return HostArena(lazy_memory(num_bytes), block_bytes)
    free_bytes = host_memory_budget_bytes(num_bytes)
    if num_bytes > free_bytes:
        raise HostMemoryFull(
            f"--elora-host-gb asks for {num_bytes / 1e9:.2f} GB of page-locked host memory for "
            f"each scheduler process, and {max(free_bytes, 0) / 1e9:.2f} GB are free for this one: "
            "lower --elora-host-gb (0 reads adapters from their files for each use)"
        )
    return HostArena(page_locked_memory(num_bytes), block_bytes)


def page_locked_memory(num_bytes: int) -> torch.Tensor:
    """Page-locked memory, uint8 ``[num_bytes]``, for asynchronous copies to a CUDA device.

    One allocation, registered with CUDA like SGLang's HiCache memory: torch's own page-locked
    memory is rounded up to a power of two, and stays page-locked in that size when it is freed.

    Raises:
        HostMemoryFull: It cannot be allocated or page-locked.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    started_s = time.perf_counter()
    try:
        memory = alloc_with_host_register(
            (num_bytes,), torch.uint8, "cpu", pin_memory=True, allocator=HostTensorAllocator()
        )
    except (RuntimeError, OSError, MemoryError) as error:
        raise HostMemoryFull(
            f"the {num_bytes / 1e9:.2f} GB of --elora-host-gb cannot be page-locked ({error}): "
            "lower --elora-host-gb, or raise the limit on locked memory (ulimit -l)"
        ) from error
    logger.info(
        "Page-locked %.2f GB of host memory for adapters in %.1f s",
        num_bytes / 1e9,
        time.perf_counter() - started_s,
    )
    return memory
