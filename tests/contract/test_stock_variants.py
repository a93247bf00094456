"""Variants of stock SGLang: equal outputs, and only the one thing changed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    WeightRef,
)
from tests.harness.programs import source
from tests.harness.run_python import RunPython

QKV = ModuleShape("qkv_proj", 96, (128, 64, 64))
GATE_UP = ModuleShape("gate_up_proj", 96, (80, 80))
OUT = ModuleShape("o_proj", 128, (96,))
SHAPES = {shape.name: shape for shape in (QKV, GATE_UP, OUT)}
RANKS = (8, 3, 64, 0, 24)  # by slot; slot 3 is the base model's
SCALINGS = (0.5, 2.0, 0.75, 0.0, 1.0)
MAX_RANK, BASE, LAYER = 64, 3, 0

BATCHES = {
    "one request": [(0, 7)],
    "one adapter, adjacent": [(1, 4), (1, 5)],
    "one adapter, others between": [(2, 3), (0, 2), (2, 4), (4, 1), (2, 1)],
    "base model between": [(BASE, 3), (4, 2), (BASE, 1), (4, 2)],
    "base model alone": [(BASE, 2), (BASE, 2)],
    "decode": [(slot, 1) for slot in (0, 1, 0, 2, 4, 3, 1, 0)],
}


@pytest.fixture(scope="module")
def sglang() -> Any:
    """SGLang's backend and ours, imported at first use: it warns, and takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.lora.backend import torch_backend
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        from sglang_elora.platforms.host_memory import _without_pinning
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
        from sglang_elora.stock.grouped_backend import GroupedLoRABackend
    return SimpleNamespace(
        native=torch_backend.TorchNativeLoRABackend,
        grouped=GroupedLoRABackend,
        paged=EloraTorchBackend,
        mode=ForwardMode,
        unpinned=_without_pinning,
    )


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch, sglang: Any) -> None:
    """As on the CPU platform: torch cannot pin memory without an accelerator."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    for name in ("zeros", "tensor"):
        monkeypatch.setattr(torch, name, sglang.unpinned(getattr(torch, name)))


class Slab:
    """Weights in SGLang's layout: stacked A at the adapter's rank, B padded to the largest."""

    def __init__(self, shape: ModuleShape, dtype: torch.dtype, whole: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        parts = len(shape.out_features)

        def drawn(*size: int) -> torch.Tensor:
            if whole:
                return torch.randint(-8, 9, size, generator=generator).to(dtype)
            return torch.randn(size, generator=generator).to(dtype)

        self.a = torch.zeros(len(RANKS), parts * MAX_RANK, shape.in_features, dtype=dtype)
        self.b = torch.zeros(len(RANKS), sum(shape.out_features), MAX_RANK, dtype=dtype)
        for slot, rank in enumerate(RANKS):
            self.a[slot, : parts * rank] = drawn(parts * rank, shape.in_features)
            self.b[slot, :, :rank] = drawn(sum(shape.out_features), rank)

    def matrices(self, slot: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        rank = RANKS[slot]
        return self.a[slot, : parts * rank], self.b[slot, :, :rank]


def prepared(backend: Any, segments: Sequence[tuple[int, int]], sglang: Any) -> Any:
    slots, lengths = zip(*segments, strict=True)
    decodes = set(lengths) == {1}
    batch = SimpleNamespace(
        batch_size=len(slots),
        forward_mode=sglang.mode.DECODE if decodes else sglang.mode.EXTEND,
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
        extend_seq_lens_cpu=list(lengths),
    )
    backend.prepare_lora_batch(batch, list(slots), list(RANKS), list(SCALINGS), False)
    return backend


def run(backend: Any, shape: ModuleShape, a: Any, b: Any, x: Any, base: Any) -> torch.Tensor:
    """What SGLang's layer of this module does with a backend."""
    ends = torch.tensor([0, *shape.out_features]).cumsum(0).to(torch.int32)
    options = {"output_offset": ends, "output_offset_cpu": ends, "base_output": base}
    if shape is QKV:
        return backend.run_qkv_lora(x=x, qkv_lora_a=a, qkv_lora_b=b, max_qkv_out_dim=128, **options)
    if shape is GATE_UP:
        return backend.run_gate_up_lora(x=x, gate_up_lora_a=a, gate_up_lora_b=b, **options)
    inner = backend.run_lora_a_sgemm(x, a)
    return backend.run_lora_b_sgemm(x=inner, weights=b, **options)


def inputs(
    shape: ModuleShape, num_rows: int, dtype: torch.dtype, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = (num_rows, shape.in_features), (num_rows, sum(shape.out_features))
    if whole:
        return tuple(torch.randint(-8, 9, s, generator=generator).to(dtype) for s in sizes)  # type: ignore[return-value]
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_grouped_backend_equals_torch_native(
    batch: str, name: str, dtype: torch.dtype, sglang: Any
) -> None:
    shape, segments = SHAPES[name], BATCHES[batch]
    slab = Slab(shape, dtype, whole=False)
    x, base = inputs(shape, sum(n for _, n in segments), dtype, whole=False)
    native, grouped = (
        run(
            prepared(kind(len(RANKS), torch.device("cpu")), segments, sglang),
            *(shape, slab.a, slab.b, x, base.clone()),
        )
        for kind in (sglang.native, sglang.grouped)
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        grouped, native, rtol=tolerance, atol=float(tolerance * native.abs().max())
    )
    if batch == "base model alone":
        assert torch.equal(grouped, base)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_grouped_backend_is_bit_identical_to_both_where_sums_are_exact(
    batch: str, name: str, sglang: Any
) -> None:
    """Small whole numbers: sums are exact in float32, in any order of the rows."""
    shape, segments = SHAPES[name], BATCHES[batch]
    slab = Slab(shape, torch.float32, whole=True)
    x, base = inputs(shape, sum(n for _, n in segments), torch.float32, whole=True)
    native, grouped = (
        run(
            prepared(kind(len(RANKS), torch.device("cpu")), segments, sglang),
            *(shape, slab.a, slab.b, x, base.clone()),
        )
        for kind in (sglang.native, sglang.grouped)
    )
    assert torch.equal(grouped, native)
    assert torch.equal(grouped, paged(shape, slab, segments, x, base.clone(), sglang))


def paged(
    shape: ModuleShape,
    slab: Slab,
    segments: Sequence[tuple[int, int]],
    x: torch.Tensor,
    base: torch.Tensor,
    sglang: Any,
) -> torch.Tensor:
    """What elora_torch computes with the same adapters in pages of a KV pool."""
    k, v = (torch.zeros(1, 9000, 2, 32) for _ in range(2))
    planes = KVPlanes((list(k), list(v)), torch.float32)
    numbers = random.Random(0).sample(range(1, 9000), 8999)
    adapters: dict[int, PagedAdapter] = {}
    for slot, rank in enumerate(RANKS):
        if rank:
            layout = AdapterLayout.build(rank, [shape])
            found = slab.matrices(slot, len(shape.out_features))
            image = AdapterImage.build(
                layout, 1, lambda *_, m=found: m, torch.float32, SCALINGS[slot]
            )
            count = layout.num_slots(planes.slot_elems, 1)
            table = SlotTable(torch.tensor([numbers.pop() for _ in range(count)]))
            planes.write(table, image)
            adapters[slot] = PagedAdapter(layout, table, planes, SCALINGS[slot])
    backend = sglang.paged(1, torch.device("cpu"), max_adapters=64)
    backend.set_model((shape,), torch.float32, max_rank=MAX_RANK, tp_size=1)
    backend.set_batch([(adapters.get(slot), length) for slot, length in segments])
    a = WeightRef(LAYER, shape.name, slab.a.shape, x.device)
    b = WeightRef(LAYER, shape.name, slab.b.shape, x.device)
    return run(backend, shape, a, b, x, base)


def test_grouped_backend_reads_what_a_load_has_put_into_a_slot(sglang: Any) -> None:
    slab = Slab(QKV, torch.float32, whole=True)
    x, base = inputs(QKV, 4, torch.float32, whole=True)
    native, grouped = (
        kind(len(RANKS), torch.device("cpu")) for kind in (sglang.native, sglang.grouped)
    )
    outputs = []
    for _ in range(2):
        for backend in (native, grouped):
            prepared(backend, [(1, 1), (2, 2), (1, 1)], sglang)
            outputs.append(run(backend, QKV, slab.a, slab.b, x, base.clone()))
        slab.a[1].add_(1)  # in place, as SGLang copies an adapter into its slot
        slab.b[2].mul_(2)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[1], outputs[3])


def test_grouped_backend_refuses_adapters_on_embeddings(sglang: Any) -> None:
    backend = prepared(sglang.grouped(len(RANKS), torch.device("cpu")), [(0, 2)], sglang)
    with pytest.raises(NotImplementedError, match="embed_tokens or lm_head"):
        backend.run_lora_a_embedding(input_ids=None, weights=None, vocab_size=9)
    with pytest.raises(NotImplementedError, match="lm_head"):
        backend.run_lora_a_sgemm(torch.zeros(2, 96), torch.zeros(5, 64, 96), pruned_batch_info=None)


@pytest.mark.parametrize("variant", ["none", "overlap"])
def test_overlap_variant_lifts_only_the_limit_on_loaded_adapters(
    variant: str, run_python: RunPython
) -> None:
    result = run_python("-c", source("stock_overlap"), variant)
    assert result.returncode == 0, result.stderr
    assert "checked" in result.stdout
