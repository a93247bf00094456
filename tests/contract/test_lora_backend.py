"""The LoRA backends compute mixed batches from scattered pages, against plain torch.

All cases run through ``elora_torch`` and ``elora_triton``, whose kernels run under Triton's
interpreter.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from tests.harness import kernel_cases
from tests.harness.tolerances import TOLERANCES

QKV = ModuleShape("qkv_proj", 96, (128, 64, 64))
GATE_UP = ModuleShape("gate_up_proj", 96, (80, 80))
OUT = ModuleShape("o_proj", 128, (96,))
SHAPES = {shape.name: shape for shape in (QKV, GATE_UP, OUT)}
NUM_LAYERS, LAYER = 2, 1


@dataclass
class Truth:
    """An adapter on the device and its plain matrices."""

    pool: Any
    paged: PagedAdapter
    scaling: float
    rank: int
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def delta(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if name not in self.matrices:
            return torch.zeros(len(x), sum(SHAPES[name].out_features))
        a, b = (matrix.float() for matrix in self.matrices[name])
        parts, start = [], 0
        for part, out in enumerate(SHAPES[name].out_features):
            inner = x.float() @ a[part * self.rank : (part + 1) * self.rank].T * self.scaling
            parts.append(inner @ b[start : start + out].T)
            start += out
        return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def sglang() -> Any:
    """SGLang's layers and our backends, imported at first use: it warns, and takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.lora.layers import BaseLayerWithLoRA
        from sglang.srt.lora.torch_ops import lora_ops
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        from sglang_elora.srt.lora import triton_backend
        from sglang_elora.srt.lora.lora_backend import Graph
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
    return SimpleNamespace(
        layer=BaseLayerWithLoRA,
        ops=lora_ops,
        context=lambda pool: forward_context(
            ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=pool))
        ),
        triton_backend=triton_backend,
        Graph=Graph,
        classes={
            "elora_torch": EloraTorchBackend,
            "elora_triton": triton_backend.EloraTritonBackend,
        },
    )


class Backends:
    """Makes backends that compute from a pool, as in a forward pass over it."""

    def __init__(self, sglang: Any, name: str, stack: ExitStack) -> None:
        self.sglang, self.name, self.stack = sglang, name, stack
        self.tp_size = 1

    def over(
        self, pool: Any, dtype: torch.dtype = torch.float32, deterministic: bool = False
    ) -> Any:
        backend = self.sglang.classes[self.name](
            1,
            torch.device("cpu"),
            max_adapters=64,
            server_args=SimpleNamespace(enable_deterministic_inference=deterministic),
        )
        backend.set_model(tuple(SHAPES.values()), dtype, max_rank=64, tp_size=self.tp_size)
        self.stack.enter_context(self.sglang.context(pool))
        return backend


@pytest.fixture(params=["elora_torch", "elora_triton"])
def backends(request: pytest.FixtureRequest, sglang: Any) -> Iterator[Backends]:
    with ExitStack() as stack:
        yield Backends(sglang, request.param, stack)


@pytest.fixture
def triton_backends(sglang: Any) -> Iterator[Backends]:
    with ExitStack() as stack:
        yield Backends(sglang, "elora_triton", stack)


def make_adapters(dtype: torch.dtype, ranks: list[int], seed: int) -> list[Truth]:
    """Adapters in scattered slots of one pool; every third lacks a module."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    k, v = ([torch.zeros(9000, 2, 32, dtype=dtype) for _ in range(NUM_LAYERS)] for _ in range(2))
    pool = SimpleNamespace(k_buffer=k, v_buffer=v)
    planes = KVPlanes((k, v), dtype)
    numbers = rng.sample(range(1, 9000), 8999)
    adapters = []
    for i, rank in enumerate(ranks):
        names = [name for name in SHAPES if i % 3 != 2 or name != "gate_up_proj"]
        matrices = {
            name: (
                torch.randn(len(s.out_features) * rank, s.in_features, generator=generator),
                torch.randn(sum(s.out_features), rank, generator=generator) / rank,
            )
            for name, s in SHAPES.items()
            if name in names
        }
        matrices = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in matrices.items()}
        layout = AdapterLayout.build(rank, [SHAPES[name] for name in names])
        scaling = rng.choice([0.5, 1.0, 2.0])
        image = AdapterImage.build(
            layout, NUM_LAYERS, lambda _, name, m=matrices: m[name], dtype, scaling
        )
        table = SlotTable(
            torch.tensor([numbers.pop() for _ in range(layout.num_slots(planes.slot_elems, 1))])
        )
        planes.write(table, image)
        paged = PagedAdapter(layout, table, planes, scaling)
        adapters.append(Truth(pool, paged, scaling, rank, matrices))
    return adapters


def run(backend: Any, name: str, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What SGLang's layer of this module does with a backend."""
    shape = SHAPES[name]
    a = WeightRef(LAYER, name, (1, len(shape.out_features) * 64, shape.in_features), x.device)
    b = WeightRef(LAYER, name, (1, sum(shape.out_features), 64), x.device)
    ends = torch.tensor([0, *shape.out_features]).cumsum(0)
    options = {"output_offset": ends, "output_offset_cpu": ends, "base_output": base}
    if name == "qkv_proj":
        return backend.run_qkv_lora(x=x, qkv_lora_a=a, qkv_lora_b=b, max_qkv_out_dim=128, **options)
    if name == "gate_up_proj":
        return backend.run_gate_up_lora(x=x, gate_up_lora_a=a, gate_up_lora_b=b, **options)
    inner = backend.run_lora_a_sgemm(x, a)
    return backend.run_lora_b_sgemm(x=inner, weights=b, **options)


MIXES = {
    "one row each": ([1, 8, 24, 64], [(i, 1) for i in range(4)]),
    "base only rows between": ([4], [(0, 1), (None, 2), (0, 1)]),
    "empty segments": ([8, 8], [(0, 0), (1, 3), (0, 0)]),
    "pairs": ([1 + 4 * (i % 16) for i in range(16)], [(i * 7 % 16, 2) for i in range(16)]),
    # What the kernels are tested over.
    **{
        name: (ranks, [(None if i < 0 else i, n) for i, n in segments])
        for name, (ranks, segments) in kernel_cases.MIXES.items()
    },
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mix", MIXES)
def test_lora_backend_equals_the_reference_for_mixed_batches(
    mix: str, name: str, dtype: torch.dtype, backends: Backends
) -> None:
    ranks, segments = MIXES[mix]
    adapters = make_adapters(dtype, ranks, seed=len(mix))
    rows = [i for i, length in segments for _ in range(length)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(rows), SHAPES[name].in_features, generator=generator).to(dtype)
    base = torch.randn(len(rows), sum(SHAPES[name].out_features), generator=generator).to(dtype)
    expected = base.float().clone()
    for row, i in enumerate(rows):
        if i is not None:
            expected[row] += adapters[i].delta(x[row : row + 1], name)[0]

    backend = backends.over(adapters[0].pool, dtype)
    backend.set_batch([(None if i is None else adapters[i].paged, n) for i, n in segments])
    output = run(backend, name, x, base)
    assert output.data_ptr() == base.data_ptr(), "added in place"
    rtol, atol = TOLERANCES[dtype].values()
    scale = expected.abs().max() if len(rows) else 1
    torch.testing.assert_close(output.float(), expected, rtol=rtol, atol=float(atol * scale))


def test_lora_backend_leaves_base_rows_bit_identical(backends: Backends) -> None:
    adapters = make_adapters(torch.float32, [8], seed=0)
    base = torch.randn(5, 256)
    before = base.clone()
    backend = backends.over(adapters[0].pool)
    backend.set_batch([(None, 2), (adapters[0].paged, 1), (None, 2)])
    output = run(backend, "qkv_proj", torch.randn(5, 96), base)
    assert torch.equal(output[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert not torch.equal(output[2], before[2])


def test_lora_layer_without_adapters_takes_the_plain_path(sglang: Any, backends: Backends) -> None:
    adapters = make_adapters(torch.float32, [8], seed=0)
    backend = backends.over(adapters[0].pool)
    layer = SimpleNamespace(lora_backend=backend, set_lora=True)
    active = sglang.layer.lora_active.fget
    assert not active(layer)
    backend.set_batch([(adapters[0].paged, 1)])
    assert active(layer)
    backend.set_batch([(None, 3)])
    assert not active(layer)
    backend.reset_batch_state()
    assert not active(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lora_backend_rounds_as_torch_native_for_any_batch_neighbours(
    dtype: torch.dtype, sglang: Any, backends: Backends
) -> None:
    """Bit by bit: SGLang's eager backend, ours on adjacent rows, ours on rows between others.

    Small whole numbers and a scaling of 0.75 keep sums exact in float32, in any order, so that
    only rounding to the weights' dtype can differ.
    """
    generator = torch.Generator().manual_seed(0)

    def whole_numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(dtype)

    rank, scaling = 8, 0.75
    a, b = whole_numbers(3 * rank, 96), whole_numbers(256, rank)
    k, v = torch.zeros(2, NUM_LAYERS, 99, 4096, dtype=dtype)
    planes = KVPlanes((k, v), dtype)
    layout = AdapterLayout.build(rank, [QKV])
    table = SlotTable(torch.arange(layout.num_slots(4096, 1)))
    planes.write(table, AdapterImage.build(layout, 2, lambda *_: (a, b), dtype, scaling))
    paged = PagedAdapter(layout, table, planes, scaling)
    x, base = whole_numbers(6, 96), whole_numbers(6, 256)

    one = torch.tensor([0]), torch.tensor([6]), torch.tensor([rank])
    ends = torch.tensor([0, *QKV.out_features]).cumsum(0)
    ops = sglang.ops
    inner = ops.sgemm_lora_a_fwd(x, a[None], *one, torch.tensor([scaling]), num_slices=3)
    theirs = ops.sgemm_lora_b_fwd(inner, b[None], *one, ends, base_output=base.clone())

    backend = backends.over(SimpleNamespace(k_buffer=list(k), v_buffer=list(v)), dtype)
    mine = [0, 1, 3, 4, 5, 7]
    spread_x, spread_base = x.new_zeros(8, 96), base.new_zeros(8, 256)
    spread_x[mine], spread_base[mine] = x, base
    backend.set_batch([(paged, 6)])
    assert torch.equal(run(backend, "qkv_proj", x, base), theirs)
    backend.set_batch([(paged, 2), (None, 1), (paged, 3), (None, 1), (paged, 1)])
    assert torch.equal(run(backend, "qkv_proj", spread_x, spread_base)[mine], theirs)


def test_lora_backend_refuses_unsupported_inputs(backends: Backends) -> None:
    adapters = make_adapters(torch.float32, [8], seed=0)
    backend = backends.over(adapters[0].pool)
    backend.set_batch([(adapters[0].paged, 4)])
    a = WeightRef(LAYER, "o_proj", (1, 64, 128), torch.device("cpu"))
    with pytest.raises(AssertionError, match="o_proj: 3 rows in a batch of 4"):
        backend.run_lora_a_sgemm(torch.zeros(3, 128), a)
    with pytest.raises(NotImplementedError, match="set_batch"):
        backend.prepare_lora_batch(None, [0], [8], [1.0], use_decode_cuda_graph=False)


class Replays:
    """Launches kernels again with the arguments and memory of the first time, as a CUDA graph."""

    def __init__(self, triton_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[Any] = []
        shrink, expand = triton_backend.lora_shrink, triton_backend.lora_expand

        def captured_shrink(*args: Any, **kwargs: Any) -> torch.Tensor:
            inner = shrink(*args, **kwargs)
            self.launches.append(lambda: shrink(*args, **kwargs, out=inner))
            return inner

        def captured_expand(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.launches.append(lambda: expand(*args, **kwargs))
            return expand(*args, **kwargs)

        monkeypatch.setattr(triton_backend, "lora_shrink", captured_shrink)
        monkeypatch.setattr(triton_backend, "lora_expand", captured_expand)

    def __call__(self) -> None:
        for launch in self.launches:
            launch()


@pytest.mark.parametrize("phase", ["DECODE", "PREFILL"])
def test_cuda_graphs_use_the_tables_as_of_replay(
    phase: str, sglang: Any, triton_backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured over no adapters, replayed over one batch after the other, the last without any."""
    adapters = make_adapters(torch.float32, [8, 1, 24, 64, 3], seed=4)
    backend = triton_backends.over(adapters[0].pool)
    graph = sglang.Graph[phase]
    if graph is sglang.Graph.DECODE:
        backend.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=8, num_tokens_per_req=1)
    else:
        backend.init_prefill_cuda_graph_batch_info(max_num_tokens=8, max_num_requests=5)
    replay = Replays(sglang.triton_backend, monkeypatch)
    x, output = torch.zeros(8, 96), torch.zeros(8, 256)
    backend.set_batch([(None, 1)] * 5, graph)
    layer = SimpleNamespace(lora_backend=backend, set_lora=True)
    assert sglang.layer.lora_active.fget(layer), "capture would leave the kernels out"
    run(backend, "qkv_proj", x, output)
    assert not output.any()

    generator = torch.Generator().manual_seed(0)
    for batch in ([0, 1, 2, 3, 4], [4, 4, None, 0], [3], [], [2, 2, 1, None, 3], [None, None]):
        x.copy_(torch.randn(8, 96, generator=generator))
        base = torch.randn(8, 256, generator=generator)
        output.copy_(base)
        backend.set_batch([(None if i is None else adapters[i].paged, 1) for i in batch], graph)
        replay()
        for row, i in enumerate([*batch, *[None] * (8 - len(batch))]):
            expected = base[row]
            if i is not None:
                expected = expected + adapters[i].delta(x[row : row + 1], "qkv_proj")[0]
            torch.testing.assert_close(output[row], expected, rtol=1e-5, atol=1e-3)
            assert i is not None or torch.equal(output[row], base[row])


def test_lora_splits_are_summed_before_the_all_reduce(triton_backends: Backends) -> None:
    """What ranks sum over each other has one value per element."""
    adapters = make_adapters(torch.float32, [8], seed=0)
    x = torch.randn(2, 128)
    a = WeightRef(LAYER, "o_proj", (1, 64, 128), x.device)
    inners = []
    for triton_backends.tp_size in (1, 2):
        backend = triton_backends.over(adapters[0].pool)
        backend.set_batch([(adapters[0].paged, 2)])
        inners.append(backend.run_lora_a_sgemm(x, a))
    one, two = inners
    assert len(two) == 1
    rank = adapters[0].rank
    torch.testing.assert_close(one.sum(dim=0)[:, :rank], two[0, :, :rank])


def test_lora_rows_are_bit_identical_alone_batched_and_in_graphs(triton_backends: Backends) -> None:
    """Bit by bit: a row alone, among many others, in a decode graph and in a prefill graph."""
    adapters = make_adapters(torch.float32, [24, 8, 64], seed=0)
    backend = triton_backends.over(adapters[0].pool, deterministic=True)
    backend.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=8, num_tokens_per_req=1)
    backend.init_prefill_cuda_graph_batch_info(max_num_tokens=200, max_num_requests=5)
    generator = torch.Generator().manual_seed(0)
    x, base = torch.randn(1, 96, generator=generator), torch.randn(1, 256, generator=generator)
    batches = [
        ([(adapters[0].paged, 1)], None),
        ([(adapters[1].paged, 3), (adapters[0].paged, 70)], None),
        ([(adapters[2].paged, 1), (adapters[0].paged, 1)], triton_backends.sglang.Graph.DECODE),
        ([(None, 1), (adapters[0].paged, 150)], triton_backends.sglang.Graph.PREFILL),
    ]
    results = []
    for segments, graph in batches:
        num_rows = sum(length for _, length in segments)
        first = num_rows - segments[-1][1]
        others_x = torch.randn(num_rows, 96, generator=generator)
        others_base = torch.randn(num_rows, 256, generator=generator)
        others_x[first], others_base[first] = x[0], base[0]
        backend.set_batch(segments, graph)
        results.append(run(backend, "qkv_proj", others_x, others_base)[first])
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], base[0])


def test_warm_up_launches_the_kernels_batches_use(
    sglang: Any, triton_backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later launches differ in nothing that a kernel is compiled for."""
    adapters = make_adapters(torch.float32, [8, 1, 24, 64, 3], seed=4)
    backend = triton_backends.over(adapters[0].pool)
    compiled = set()

    def compiled_for(module: Any, tables: Any, config: Any, width: int) -> Any:
        launch = {**dataclasses.asdict(config), "num_splits": 0, "lanes": 0, "max_tile_programs": 0}
        strides = (width % 16, width == 1)
        return (module.index, tables.tile_rows, tuple(launch.items()), strides)

    def shrink(x: Any, plane: Any, tables: Any, module: Any, **kwargs: Any) -> torch.Tensor:
        config, width = kwargs["config"], kwargs["width"]
        compiled.add(("shrink", compiled_for(module, tables, config, width)))
        return torch.zeros(config.num_splits, len(x), width)

    def expand(
        inner: Any, plane: Any, tables: Any, module: Any, output: Any, **kwargs: Any
    ) -> torch.Tensor:
        key = compiled_for(module, tables, kwargs["config"], inner.shape[2])
        compiled.add(("expand", key))
        return output

    monkeypatch.setattr(sglang.triton_backend, "lora_shrink", shrink)
    monkeypatch.setattr(sglang.triton_backend, "lora_expand", expand)
    backend.warm_up(KVPlanes((adapters[0].pool.k_buffer, adapters[0].pool.v_buffer), torch.float32))
    warm = set(compiled)
    assert warm
    for num_rows in (1, 3, 40, 300, 2000):
        for some in (adapters, adapters[:1], adapters[1:2]):
            backend.set_batch([(adapter.paged, num_rows) for adapter in some])
            for name in SHAPES:
                rows = num_rows * len(some)
                x = torch.zeros(rows, SHAPES[name].in_features)
                run(backend, name, x, torch.zeros(rows, sum(SHAPES[name].out_features)))
    assert compiled == warm


def test_page_tables_cause_no_host_sync(triton_backends: Backends) -> None:
    """The numbers of slots are not read back, as the torch backend does to find adjacent ones."""
    adapters = make_adapters(torch.float32, [8], seed=0)
    backend = triton_backends.over(adapters[0].pool)
    backend.set_batch([(adapters[0].paged, 2)])
    run(backend, "o_proj", torch.zeros(2, 128), torch.zeros(2, 96))
    assert "_numbers" not in vars(adapters[0].paged._table)
