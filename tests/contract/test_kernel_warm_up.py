"""Warm-up compiles every kernel that serving launches.

Launches are compared by Triton's own key: types, alignment of pointers, divisibility of integers,
and constants.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.kernels import launch_configs
from sglang_elora.pages import (
    EMBEDDING,
    OUTSIDE_LAYERS,
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    VocabularyModule,
    WeightRef,
)
from sglang_elora.pages.layout import padded
from tests.harness.specializations import Launches, unaligned

NUM_LAYERS, NUM_SLOTS, MAX_RANK = 9, 600, 64
VOCAB_SIZE = 9 * 64 - 10  # the last layer has a shorter part
RANKS = (1, 3, 8, 15, 16, 24, MAX_RANK)
SHAPES = (
    ModuleShape("qkv_proj", 96, (128, 64, 64)),
    ModuleShape("gate_up_proj", 100, (70, 33)),
    ModuleShape("o_proj", 128, (96,)),
    ModuleShape("down_proj", 4096, (96,)),
    *(ModuleShape(f"module_{i}", 64, (64,) * (1 + i % 3)) for i in range(5)),
)
EXPERTS = (
    ModuleShape("gate_up_proj_moe", 96, (64, 64), 4),
    ModuleShape("down_proj_moe", 64, (96,), 4),
)
EXPERTS_PER_ROW = 3


@pytest.fixture(scope="module")
def host() -> Any:
    """The backend, imported at first use: SGLang warns, and takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        from sglang_elora.srt.lora import triton_backend
        from sglang_elora.srt.lora.lora_backend import Graph
    return SimpleNamespace(
        backend=triton_backend.EloraTritonBackend,
        Graph=Graph,
        forward_over=lambda pool: forward_context(
            ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=pool))
        ),
    )


@dataclass
class Server:
    """A backend over a KV pool, and the launches of its kernels."""

    host: Any
    backend: Any
    planes: KVPlanes
    shapes: Sequence[ModuleShape]
    dtype: torch.dtype
    launches: Launches

    def adapter(self, rank: int) -> PagedAdapter:
        layout = AdapterLayout.build(rank, self.shapes, self.planes.num_planes)
        table = SlotTable(torch.zeros(layout.num_slots(self.planes.slot_elems, 1)))
        return PagedAdapter(layout, table, self.planes, 1.0)

    def forward(self, segments: Sequence[tuple[Any, int]], graph: Any, num_rows: int) -> None:
        """One pass of ``num_rows`` rows, padding included."""
        self.backend.set_batch(segments, graph)
        vocabulary = self.backend.vocabulary
        for name, module in vocabulary.items():
            weights = WeightRef(0, name, (), self.backend.device)
            if name == EMBEDDING:  # not the first rows of their memory
                tokens = torch.zeros(num_rows + 1, dtype=torch.int64)[1:]
                inner = self.backend.run_lora_a_embedding(tokens, weights)
                output = torch.empty(num_rows, module.hidden_size, dtype=self.dtype)
            else:
                x = torch.empty(num_rows, module.hidden_size, dtype=self.dtype)
                inner = self.backend.run_lora_a_sgemm(x, weights)
                output = x.new_empty(num_rows, padded(module.vocab_size))  # as SGLang pads logits
            self.backend.run_lora_b_sgemm(inner, weights, base_output=output)
        self._forward_experts(num_rows)
        others = {*vocabulary, *(shape.name for shape in EXPERTS)}
        layers = [shape for shape in self.shapes if shape.name not in others]
        for layer, shape in product((0, 1), layers):
            weights = WeightRef(layer, shape.name, (), self.backend.device)
            x = torch.empty(num_rows, shape.in_features, dtype=self.dtype)
            inner = self.backend.run_lora_a_sgemm(x, weights)
            output = x.new_empty(num_rows, sum(shape.out_features))
            self.backend.run_lora_b_sgemm(inner, weights, base_output=output)

    def _forward_experts(self, num_rows: int) -> None:
        if not any(shape in self.shapes for shape in EXPERTS):
            return
        size = num_rows, EXPERTS_PER_ROW
        # Of another type and layout than most of SGLang's routers give.
        experts = torch.zeros(*reversed(size), dtype=torch.int64).T
        for layer in (0, 1):
            routes = self.backend.routes(experts)
            for shape, leading in zip(EXPERTS, ((num_rows,), size), strict=True):
                weights = WeightRef(layer, shape.name, (), self.backend.device)
                x = torch.empty(*leading, shape.in_features, dtype=self.dtype).flatten(0, -2)
                output = x.new_empty(num_rows * EXPERTS_PER_ROW, sum(shape.out_features))
                self.backend.add_to_routes(x, weights, output, routes)


def make_pool(kv_dtype: torch.dtype, num_planes: int, offset: int) -> list[list[torch.Tensor]]:
    """Layers that begin ``offset`` bytes after a multiple of 16 from the second on."""
    slot = 64 * kv_dtype.itemsize
    return [
        [
            unaligned(NUM_SLOTS * slot, offset if layer else 0).view(kv_dtype).view(-1, 1, 64)
            for layer in range(NUM_LAYERS)
        ]
        for _ in range(num_planes)
    ]


@pytest.fixture
def serve(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    contexts = []

    def start(
        num_modules: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype = torch.bfloat16,
        num_planes: int = 2,
        offset: int = 0,
        tp_size: int = 1,
        deterministic: bool = False,
        vocabulary: bool = False,
        experts: bool = False,
    ) -> Server:
        pool = make_pool(kv_dtype, num_planes, offset)
        launches = Launches().record(monkeypatch)
        backend = host.backend(
            1,
            torch.device("cpu"),
            max_adapters=32,
            server_args=SimpleNamespace(enable_deterministic_inference=deterministic),
        )
        names = sorted(OUTSIDE_LAYERS) if vocabulary else []
        backend.vocabulary = {
            name: VocabularyModule(name, 96, VOCAB_SIZE, NUM_LAYERS) for name in names
        }
        backend.experts_per_row = EXPERTS_PER_ROW
        shapes = [*SHAPES[:num_modules], *(m.shape for m in backend.vocabulary.values())]
        shapes += EXPERTS if experts else ()
        backend.set_model(shapes, dtype, max_rank=MAX_RANK, tp_size=tp_size)
        context = host.forward_over(SimpleNamespace(k_buffer=pool[0], v_buffer=pool[-1]))
        context.__enter__()
        contexts.append(context)
        planes = KVPlanes(pool, dtype, use_kernels=True)
        return Server(host, backend, planes, shapes, dtype, launches)

    yield start
    for context in reversed(contexts):
        context.__exit__(None, None, None)


def all_batches(server: Server) -> None:
    """Of one to nine tiles and more, of one adapter and many, in graphs and without."""
    adapters = [server.adapter(rank) for rank in RANKS]
    for num_rows, some in product((1, 2, 3, 17, 40), (1, 2, 3, 4, 5, 6, 7)):
        segments = [(adapter, num_rows) for adapter in adapters[:some]]
        server.forward(segments, None, num_rows * some)
    for num_tiles in range(1, 10):
        server.forward([(adapters[2], 64 * num_tiles - 3)], None, 64 * num_tiles - 3)
    for num_rows in (300, 2000, 9000):
        server.forward([(adapters[-1], num_rows), (None, 7)], None, num_rows + 7)
    for graph, num_rows in product(server.host.Graph, (1, 2, 5, 8, 24)):
        server.forward([(None, num_rows)], graph, num_rows)
        server.forward([(adapters[3], 1), (adapters[0], num_rows)], graph, num_rows + 1)


CASES: dict[str, dict[str, Any]] = {
    **{f"{n} modules": {"num_modules": n} for n in range(1, 10)},
    "float32": {"num_modules": 4, "dtype": torch.float32, "kv_dtype": torch.float32},
    "fp8 KV": {"num_modules": 3, "kv_dtype": torch.uint8},
    "one plane": {"num_modules": 3, "num_planes": 1},
    "unaligned layers": {"num_modules": 1, "offset": 8},
    "tensor parallel": {"num_modules": 4, "tp_size": 2},
    "deterministic": {"num_modules": 4, "deterministic": True},
    "experts": {"num_modules": 1, "experts": True},
    "experts, unaligned layers": {"num_modules": 1, "experts": True, "offset": 8},
    "experts, deterministic": {"num_modules": 1, "experts": True, "deterministic": True},
    "vocabulary": {"num_modules": 2, "vocabulary": True},
    "vocabulary, unaligned layers": {"num_modules": 1, "vocabulary": True, "offset": 8},
    "vocabulary, tensor parallel": {"num_modules": 1, "vocabulary": True, "tp_size": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_warm_up_compiles_the_lora_kernels_of_any_batch(serve: Any, name: str) -> None:
    server = serve(**CASES[name])
    for max_batch in (25, 32):  # captures of graphs come before the cache, so before warm-up
        server.backend.init_decode_cuda_graph_batch_info(max_batch, 1)
        server.backend.init_prefill_cuda_graph_batch_info(max_batch)
        server.launches.keys.clear()
        server.backend.warm_up(server.planes)
        warm = set(server.launches.keys)
        expected = {"lora_shrink", "lora_expand", "page_copy"}
        expected |= {"lora_lookup"} if server.backend.vocabulary else set()
        expected |= {"routed_tiles"} if "experts" in CASES[name] else set()
        assert {kernel for kernel, _ in warm} == expected
        all_batches(server)
        assert server.launches.keys == warm  # and warm-up compiles nothing that batches never use


@pytest.mark.parametrize(
    ("dtype", "file"), [(torch.bfloat16, "default.json"), (torch.float32, "float32.json")]
)
def test_launch_configs_match_the_weights_dtype(serve: Any, dtype: torch.dtype, file: str) -> None:
    """float32 tiles of the other file's size do not fit a GPU's registers."""
    entries = json.loads((Path(launch_configs.__file__).parent / file).read_text())
    server = serve(2, dtype=dtype)
    server.backend.warm_up(server.planes)
    for half, block in (("shrink", "BLOCK_K"), ("expand", "BLOCK_N")):
        launched = {
            arguments[block]
            for name, arguments in server.launches.arguments
            if name == f"lora_{half}"
        }
        configured = {entry["launch"][block.lower()] for entry in entries[half]}
        assert launched and launched <= configured


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "num_planes"),
    [
        (torch.bfloat16, torch.bfloat16, 2),
        (torch.bfloat16, torch.uint8, 2),
        (torch.float32, torch.float32, 2),
        (torch.bfloat16, torch.bfloat16, 1),
    ],
)
def test_warm_up_compiles_page_copy_for_any_adapter(
    serve: Any, rank: int, dtype: torch.dtype, kv_dtype: torch.dtype, num_planes: int
) -> None:
    server = serve(4, dtype=dtype, kv_dtype=kv_dtype, num_planes=num_planes)
    server.planes.warm_up()
    warm = set(server.launches.keys)
    assert len(warm) == 1
    layout = AdapterLayout.build(rank, SHAPES[rank % 3 :: 3], num_planes)
    num_bytes = NUM_LAYERS * sum(layout.plane_elems) * dtype.itemsize
    chunks = (torch.zeros(num_bytes, dtype=torch.uint8),)
    table = SlotTable(torch.zeros(layout.num_slots(server.planes.slot_elems, 1)))
    server.planes.write(table, AdapterImage(layout, dtype, NUM_LAYERS, chunks, 1.0, "zeros"))
    assert len(server.launches.arguments) >= 2
    assert server.launches.keys == warm
