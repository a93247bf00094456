"""Adapter copies concurrent with a batch on a GPU: correctness and speed, in one call.

    python -m benchmarks.gpu.copies --out OUT_DIR [--dry-run]

The server's own ``Residency`` with a pool of Llama-3-8B's shape, adapters of rank 32 on all linear
layers, and in place of a batch a long run of matrix products on the forward stream. Checked and
measured:

* a running batch that reads slots reads their old bytes, although a copy into them was issued
  before it ran;
* work that waits for a layer finds this layer's weights, layer by layer;
* the time of a copy on the scheduler's thread, on the link, and until the first layer is loaded,
  and the slowdown of a concurrent batch.

--dry-run runs everything on a CPU with tiny sizes; its times are meaningless.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import torch  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.pages import (  # noqa: E402
    AdapterImage,
    AdapterLayout,
    HostArena,
    ModuleShape,
    block_bytes_for,
    lazy_memory,
)
from sglang_elora.policy import LRU, Costs  # noqa: E402
from sglang_elora.srt.lora.adapter_memory import page_locked_memory  # noqa: E402
from tests.harness.radix_cache import Cache  # noqa: E402
from tests.harness.swapper_world import AdapterSource, HostTier, Residency  # noqa: E402

RANK = 32
LLAMA_8B = (
    ModuleShape("qkv_proj", 4096, (4096, 1024, 1024)),
    ModuleShape("o_proj", 4096, (4096,)),
    ModuleShape("gate_up_proj", 4096, (14336, 14336)),
    ModuleShape("down_proj", 14336, (4096,)),
)
TINY = (ModuleShape("o_proj", 256, (256,)),)


class Bench:
    def __init__(self, *, dry_run: bool) -> None:
        self.device = "cpu" if dry_run else "cuda"
        self.dtype = torch.float32 if dry_run else torch.bfloat16
        self.layers, shapes = (4, TINY) if dry_run else (32, LLAMA_8B)
        heads, head_dim = (1, 64) if dry_run else (8, 128)
        self.work = 64 if dry_run else 8192  # rows of the batch's products
        module = torch.get_device_module(self.device)
        self.event = lambda: module.Event() if dry_run else module.Event(enable_timing=True)
        self.forward, self.module = module.Stream(), module
        layout = AdapterLayout.build(RANK, shapes)
        self.slots = layout.num_slots(heads * head_dim, 1)
        pool_slots = 2 * self.slots
        planes = [
            [
                torch.zeros(pool_slots + 1, heads, head_dim, dtype=self.dtype, device=self.device)
                for _ in range(self.layers)
            ]
            for _ in range(2)
        ]
        pool = SimpleNamespace(k_buffer=planes[0], v_buffer=planes[1])
        self.planes = planes
        cache = Cache("elora", pool_slots, kv_pool=pool, device=self.device)
        cache.tree.tree_core.use_policy(LRU(Costs()), pool_slots)
        image_bytes = self.layers * sum(layout.plane_elems) * self.dtype.itemsize
        block_bytes = block_bytes_for(image_bytes // RANK)
        arena_bytes = 3 * (image_bytes + block_bytes)
        memory = lazy_memory(arena_bytes) if dry_run else page_locked_memory(arena_bytes)
        host = HostTier(HostArena(memory, block_bytes), lambda adapter_id: 0.0)
        self.residency = Residency(cache.tree, self.dtype, host, self.forward)
        self.images = {}
        for i in range(3):
            weights = torch.randn(self.layers * sum(layout.plane_elems)).to(self.dtype)
            chunks = (weights.view(torch.uint8),)
            image = AdapterImage(layout, self.dtype, self.layers, chunks, 1.0, f"version {i}")
            adapter_id = self.images_uid(i)
            self.images[adapter_id] = image
            source = AdapterSource(adapter_id, adapter_id, layout, image.nbytes, False, image=image)
            self.residency.register(source)

    @staticmethod
    def images_uid(i: int) -> str:
        return f"{i:08}"

    def bring(self, adapter_id: str) -> tuple[Any, float]:
        """Start a copy; returns it and the seconds that this took on the scheduler's thread."""
        started = time.perf_counter()
        assert self.residency.start_copy(adapter_id)
        return self.residency.copies[adapter_id], time.perf_counter() - started

    def settle(self, adapter_id: str) -> None:
        self.residency.copies[adapter_id].synchronize()
        code = self.residency.copies[adapter_id].code
        assert self.residency.settle(adapter_id, code) is None

    def evict(self, adapter_id: str) -> torch.Tensor:
        """Evict an adapter; returns its slots, which are free now."""
        slots = self.residency.core.node_of(adapter_id).slots
        result = self.residency.core.displace(adapter_id)
        self.residency.cache._apply_eviction_result(result)
        return slots

    def in_slots(self, slots: torch.Tensor, layer: int) -> torch.Tensor:
        """A copy of the slots' content in both planes, ``[2, slots * elements]``."""
        return torch.stack([plane[layer][slots].reshape(-1) for plane in self.planes])

    def is_there(self, adapter_id: str, found: torch.Tensor, layer: int) -> bool:
        image = self.images[adapter_id]
        wanted = image.layer(layer).split(image.layout.plane_elems)
        return all(
            torch.equal(row[: len(part)].cpu(), part)
            for row, part in zip(found, wanted, strict=True)
        )

    def batch(self, rounds: int) -> None:
        """Enqueue matrix products on the current stream."""
        x = torch.ones(self.work, self.work, dtype=self.dtype, device=self.device)
        for _ in range(rounds):
            x = (x @ x) * 0.0

    def old_bytes_are_read(self, rounds: int = 40) -> bool:
        """Check that a running batch reads the old bytes of slots reassigned while it runs."""
        old, new = self.images_uid(0), self.images_uid(1)
        self.bring(old)
        self.settle(old)
        self.bring(self.images_uid(2))  # the pool is full: new has to take old's slots
        self.settle(self.images_uid(2))
        slots = self.evict(old)
        with self.module.stream(self.forward):
            self.batch(rounds)
            read = [self.in_slots(slots, layer) for layer in range(self.layers)]
        self.bring(new)
        self.settle(new)
        kept = all(self.is_there(old, found, layer) for layer, found in enumerate(read))
        arrived = sorted(self.residency.core.node_of(new).slots.tolist()) == sorted(slots.tolist())
        self.evict(new)
        self.evict(self.images_uid(2))
        return kept and arrived

    def layers_are_awaited(self) -> bool:
        adapter_id = self.images_uid(0)
        copy, _ = self.bring(adapter_id)
        slots = self.residency.core.node_of(adapter_id).slots
        with self.module.stream(self.forward):
            read = []
            for layer in range(self.layers):
                copy.wait_layer(layer)
                read.append(self.in_slots(slots, layer))
        self.settle(adapter_id)
        self.evict(adapter_id)
        return all(self.is_there(adapter_id, found, layer) for layer, found in enumerate(read))

    def times(self, rounds: int) -> dict[str, list[float]]:
        """Seconds per copy: its launch, the whole copy, and until the first layer is loaded."""
        adapter_id = self.images_uid(0)
        took: dict[str, list[float]] = {"launch_s": [], "copy_s": [], "first_layer_s": []}
        for _ in range(rounds):
            copy, launch_s = self.bring(adapter_id)
            copy.synchronize()
            took["launch_s"].append(launch_s)
            if self.device == "cuda":
                took["copy_s"].append(copy.seconds())
                first = copy.pieces[0][1]
                took["first_layer_s"].append(copy.begun.elapsed_time(first) / 1e3)
            self.settle(adapter_id)
            self.evict(adapter_id)
        return took

    def beside_a_batch(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of the same batch, alternately alone and with a concurrent copy."""
        took: dict[str, list[float]] = {"alone_s": [], "with_copy_s": []}
        adapter_id = self.images_uid(0)
        for i in range(2 * rounds):
            begun, ended = self.event(), self.event()
            with self.module.stream(self.forward):
                begun.record(self.forward)
                self.batch(10)
                ended.record(self.forward)
            if i % 2:
                self.bring(adapter_id)
                self.settle(adapter_id)
                self.evict(adapter_id)
            ended.synchronize()
            if self.device == "cuda":
                name = "with_copy_s" if i % 2 else "alone_s"
                took[name].append(begun.elapsed_time(ended) / 1e3)
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    bench = Bench(dry_run=options.dry_run)
    num_bytes = bench.images[bench.images_uid(0)].nbytes
    found: dict[str, Any] = {
        **machine(),
        "gpu": "none (dry run)" if options.dry_run else torch.cuda.get_device_name(),
        "adapter_bytes": num_bytes,
        "adapter_slots": bench.slots,
        "old_bytes_are_read": [bench.old_bytes_are_read() for _ in range(3)],
        "layers_are_awaited": [bench.layers_are_awaited() for _ in range(3)],
        "times": bench.times(options.rounds),
        "batch": bench.beside_a_batch(options.rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "copies.json").write_text(json.dumps(found, indent=1) + "\n")
    for check in ("old_bytes_are_read", "layers_are_awaited"):
        print(f"{check}: {found[check]}")
    for name, samples in {**found["times"], **found["batch"]}.items():
        if samples:
            print(f"{name}: median {1e3 * statistics.median(samples):.3f} ms")
    if found["times"]["copy_s"]:
        rate = num_bytes / statistics.median(found["times"]["copy_s"]) / 1e9
        print(f"{rate:.1f} GB/s over the link")
    if not all(found["old_bytes_are_read"] + found["layers_are_awaited"]):
        raise SystemExit("a batch saw bytes of the wrong adapter")


if __name__ == "__main__":
    main()
