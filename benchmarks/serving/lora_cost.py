"""CPU time of LoRA alone in one batch: stock's torch_native, stock's grouped variant, elora_torch.

    python -m benchmarks.serving.lora_cost [--rounds 12]

All LoRA modules of the benchmark's model, one thread, backends in turns; the median of the
thread's CPU time in ms. Columns of a fair comparison on servers are ``grouped`` and ``elora``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.sides import SHAPE
from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    WeightRef,
)
from sglang_elora.platforms.host_memory import use_plain_memory

RANKS = (8, 16, 24, 32, 48, 64, 8, 16)  # by slot
LARGEST = 64
Segments = Sequence[tuple[int, int]]  # (slot, rows)
CASES: dict[str, Segments] = {
    "decode, 8 requests of 1 adapter": [(2, 1)] * 8,
    "decode, 8 of 8 adapters": [(i, 1) for i in range(8)],
    "decode, 8 of 4, interleaved": [(i % 4, 1) for i in range(8)],
    "prefill, 300 tokens": [(3, 300)],
    "prefill, 3 x 200 tokens": [(1, 200), (3, 200), (5, 200)],
}


def modules() -> list[ModuleShape]:
    query, kv = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim
    hidden, mlp = SHAPE.hidden_size, SHAPE.intermediate_size
    return [
        ModuleShape("qkv_proj", hidden, (query, kv, kv)),
        ModuleShape("o_proj", query, (hidden,)),
        ModuleShape("gate_up_proj", hidden, (mlp, mlp)),
        ModuleShape("down_proj", mlp, (hidden,)),
    ]


class World:
    """The same adapters in SGLang's slots and in pages of a KV pool, and the three backends."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
            from sglang.srt.model_executor.forward_batch_info import ForwardMode

            from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
            from sglang_elora.stock.grouped_backend import GroupedLoRABackend
        self.modes = ForwardMode
        self.shapes = modules()
        self.slabs = {
            (layer, shape.name): (
                torch.randn(len(RANKS), len(shape.out_features) * LARGEST, shape.in_features),
                torch.randn(len(RANKS), sum(shape.out_features), LARGEST),
            )
            for layer in range(SHAPE.num_layers)
            for shape in self.shapes
        }
        self.paged = self._in_pages()
        cpu = torch.device("cpu")
        ours = EloraTorchBackend(1, cpu, max_adapters=64)
        ours.set_model(tuple(self.shapes), torch.float32, max_rank=LARGEST, tp_size=1)
        self.backends: dict[str, Any] = {
            "stock": TorchNativeLoRABackend(len(RANKS), cpu),
            "grouped": GroupedLoRABackend(len(RANKS), cpu),
            "elora": ours,
        }

    def _in_pages(self) -> list[PagedAdapter]:
        size = (SHAPE.num_layers, 20_000, SHAPE.num_kv_heads, SHAPE.head_dim)
        planes = KVPlanes((list(torch.zeros(size)), list(torch.zeros(size))), torch.float32)
        parts = {shape.name: len(shape.out_features) for shape in self.shapes}
        found, first = [], 1
        for slot, rank in enumerate(RANKS):

            def matrices(layer: int, name: str, slot: int = slot, rank: int = rank) -> Any:
                a, b = self.slabs[layer, name]
                return a[slot, : parts[name] * rank], b[slot, :, :rank]

            layout = AdapterLayout.build(rank, self.shapes)
            image = AdapterImage.build(layout, SHAPE.num_layers, matrices, torch.float32, 1.0)
            count = layout.num_slots(planes.slot_elems, 1)
            table = SlotTable(torch.arange(first, first + count))
            first += count
            planes.write(table, image)
            found.append(PagedAdapter(layout, table, planes, 1.0))
        return found

    def batch_s(self, name: str, segments: Segments, rows: dict[str, Any]) -> float:
        """CPU time of preparing the batch and computing the LoRA of all layers."""
        started_s = time.thread_time()
        backend = self.backends[name]
        if name == "elora":
            backend.set_batch([(self.paged[slot], length) for slot, length in segments])
        else:
            slots, lengths = zip(*segments, strict=True)
            decodes = set(lengths) == {1}
            batch = SimpleNamespace(
                batch_size=len(slots),
                forward_mode=self.modes.DECODE if decodes else self.modes.EXTEND,
                extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
                extend_seq_lens_cpu=list(lengths),
            )
            ones = [1.0] * len(RANKS)
            backend.prepare_lora_batch(batch, list(slots), list(RANKS), ones, False)
        for layer in range(SHAPE.num_layers):
            for shape in self.shapes:
                self._module(backend, name, layer, shape, *rows[shape.name])
        return time.thread_time() - started_s

    def _module(
        self, backend: Any, name: str, layer: int, shape: ModuleShape, x: Any, base: Any, ends: Any
    ) -> None:
        a, b = self.slabs[layer, shape.name]
        if name == "elora":
            a, b = (WeightRef(layer, shape.name, tuple(w.shape), w.device) for w in (a, b))
        options = {"output_offset": ends, "output_offset_cpu": ends, "base_output": base}
        if shape.name == "qkv_proj":
            backend.run_qkv_lora(x=x, qkv_lora_a=a, qkv_lora_b=b, max_qkv_out_dim=0, **options)
        elif shape.name == "gate_up_proj":
            backend.run_gate_up_lora(x=x, gate_up_lora_a=a, gate_up_lora_b=b, **options)
        else:
            inner = backend.run_lora_a_sgemm(x, a)
            backend.run_lora_b_sgemm(x=inner, weights=b, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_plain_memory()
    world = World()
    table = []
    for case, segments in CASES.items():
        num_rows = sum(length for _, length in segments)
        rows = {
            shape.name: (
                torch.randn(num_rows, shape.in_features),
                torch.randn(num_rows, sum(shape.out_features)),
                torch.tensor([0, *shape.out_features]).cumsum(0).to(torch.int32),
            )
            for shape in world.shapes
        }
        found: dict[str, list[float]] = {name: [] for name in world.backends}
        for _ in range(options.rounds):
            for name, samples in found.items():
                samples.append(1e3 * world.batch_s(name, segments, rows))
        ms = {name: statistics.median(samples) for name, samples in found.items()}
        over = [f"{ms[name] / ms['elora']:.2f}" for name in ("stock", "grouped")]
        table.append([case, *(f"{value:.2f}" for value in ms.values()), *over])
    print(plain_table(["", *world.backends, "stock / elora", "grouped / elora"], table))


if __name__ == "__main__":
    main()
