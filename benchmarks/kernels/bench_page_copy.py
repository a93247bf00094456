"""``page_copy``: copies of adapters from host memory to their slots, and of KV out of its slots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.shapes import MODULES, NUM_LAYERS, SLOT_ELEMS
from benchmarks.kernels.timing import event_samples
from sglang_elora.kernels import Contiguous, PoolPlanes, page_copy
from sglang_elora.pages import AdapterLayout, ModuleShape

SLOT_BYTES = 2 * SLOT_ELEMS  # bfloat16
BATCH = 8
KV_TOKENS = (1, 16, 64)


class Pool:
    """Both planes of all layers, and room for a batch of adapters in scattered slots."""

    def __init__(
        self,
        device: torch.device,
        shapes: tuple[ModuleShape, ...] = MODULES,
        num_layers: int = NUM_LAYERS,
        ranks: tuple[int, ...] = (16, 64),
    ) -> None:
        self.device, self.num_layers, self.ranks = device, num_layers, ranks
        self.layouts = {rank: AdapterLayout.build(rank, shapes) for rank in ranks}
        most = max(layout.num_slots(SLOT_ELEMS, 1) for layout in self.layouts.values())
        self.num_slots = max(BATCH * most, *KV_TOKENS) + 1
        self.tensors = [
            [
                torch.zeros(self.num_slots, SLOT_BYTES, dtype=torch.uint8, device=device)
                for _ in range(num_layers)
            ]
            for _ in range(2)
        ]
        self.planes = PoolPlanes.of(self.tensors)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.num_slots - 1, generator=generator) + 1
        self.order = order.to(device, torch.int32)

    def adapter(self, rank: int, number: int, *, on_host: bool) -> Contiguous:
        """Random weights in pinned host memory or on the device."""
        layout = self.layouts[rank]
        slots = layout.num_slots(SLOT_ELEMS, 1)
        sizes = tuple(2 * elems for elems in layout.plane_elems)
        pinned = on_host and self.device.type == "cuda"
        memory = torch.empty(
            self.num_layers,
            sum(sizes),
            dtype=torch.uint8,
            device="cpu" if on_host else self.device,
            pin_memory=pinned,
        ).random_()
        return Contiguous(memory, self.order[number * slots : (number + 1) * slots], sizes)

    def kv(self, num_tokens: int) -> Contiguous:
        size = num_tokens * SLOT_BYTES
        memory = torch.empty(self.num_layers, 2 * size, dtype=torch.uint8, device=self.device)
        return Contiguous(memory, self.order[:num_tokens], (size, size))


def cases(pool: Pool) -> Iterator[tuple[str, str, int, Callable[[], object]]]:
    """(name, name of the limiting bandwidth, bytes, work to time) of each case."""
    for rank in pool.ranks:
        host = pool.adapter(rank, 0, on_host=True)
        staging = torch.empty_like(host.memory, device=pool.device)
        staged = Contiguous(staging, host.table, host.plane_bytes)

        def through_staging(host: Contiguous = host, staged: Contiguous = staged) -> None:
            staged.memory.copy_(host.memory, non_blocking=True)
            page_copy(pool.planes, [staged], to_pool=True)

        def direct(host: Contiguous = host) -> None:
            page_copy(pool.planes, [host], to_pool=True)

        def scatter(staged: Contiguous = staged) -> None:
            page_copy(pool.planes, [staged], to_pool=True)

        size = host.memory.nbytes
        yield f"load rank {rank}, staged", "host_to_device", size, through_staging
        yield f"load rank {rank}, read by the kernel", "host_to_device", size, direct
        yield f"scatter rank {rank}", "device", 2 * size, scatter
        batch = [pool.adapter(rank, i, on_host=False) for i in range(BATCH)]

        def scatter_batch(batch: list[Contiguous] = batch) -> None:
            page_copy(pool.planes, batch, to_pool=True)

        yield f"scatter {BATCH} of rank {rank}", "device", 2 * BATCH * size, scatter_batch
    for tokens in KV_TOKENS:
        kv = pool.kv(tokens)

        def gather(kv: Contiguous = kv) -> None:
            page_copy(pool.planes, [kv], to_pool=False)

        yield f"gather KV of {tokens} tokens", "device", 2 * kv.memory.nbytes, gather


def check(pool: Pool) -> bool:
    """Whether an adapter that was written to its slots is read back unchanged."""
    for rank in pool.ranks:
        host = pool.adapter(rank, 1, on_host=False)
        page_copy(pool.planes, [host], to_pool=True)
        back = Contiguous(torch.zeros_like(host.memory), host.table, host.plane_bytes)
        page_copy(pool.planes, [back], to_pool=False)
        if not torch.equal(back.memory, host.memory):
            return False
    return True


def measure(pool: Pool, bandwidths: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per case, with the share of the measured bandwidth."""
    for name, bound, num_bytes, work in cases(pool):
        samples = event_samples(work)
        seconds = statistics.median(samples)
        yield {
            "case": name,
            "bytes": num_bytes,
            "median_us": seconds * 1e6,
            "samples_us": [sample * 1e6 for sample in samples],
            "bound": bound,
            "share_of_bandwidth": num_bytes / seconds / bandwidths[bound]["bytes_per_s"],
        }
