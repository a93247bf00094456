"""The LoRA manager in the order of a start on CUDA: graphs are captured before the cache is built.

A captured graph is emulated by its kernels' launches, run again with their arguments and memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import AdapterImage, AdapterLayout, ModuleShape, WeightRef
from tests.harness.swapper_world import HEAD_DIM, AdapterSource, SwapperWorld, adapter_id

SLOTS, WIDTH = 64, 64 * HEAD_DIM // 8  # of an adapter of rank 8
SHAPE = ModuleShape("o_proj", WIDTH, (WIDTH,))
ROWS = 8  # that graphs are captured for


@pytest.fixture(scope="module")
def host() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import (
            DecodeCudaGraphRunner,
            _lora_backend_skips_inactive,
        )
        from sglang.srt.model_executor.runner_utils import capture_mode

        from sglang_elora.srt.lora import triton_backend
        from sglang_elora.srt.lora.lora_manager import EloraLoRAManager
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
    return SimpleNamespace(
        mode=ForwardMode,
        triton_backend=triton_backend,
        manager=EloraLoRAManager,
        capture_mode=capture_mode,
        decode_runner=DecodeCudaGraphRunner,
        skips=_lora_backend_skips_inactive,
        torch_backend=EloraTorchBackend,
        forward_over=lambda pool: forward_context(
            ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=pool))
        ),
    )


class Server:
    """A LoRA manager without a model, over the pool of a scheduler that has its cache later."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.world = SwapperWorld(6 * SLOTS, num_adapters=0, adapter_slots=SLOTS, num_layers=2)
        self.manager = object.__new__(host.manager)  # of what its constructor sets, without a model
        self.manager.residency = self.manager._measure = None
        self.manager.max_adapters_in_batch, self.manager.lora_refs = 0, {}
        self.manager.attn_dp_enabled = False
        self.manager.memory_pool = SimpleNamespace(plan=SimpleNamespace(num_layers=2))
        self.manager.base_model = torch.nn.Module()
        self.manager.lora_backend = self.backend(host.triton_backend.EloraTritonBackend)

    def backend(self, kind: Any) -> Any:
        options = SimpleNamespace(enable_deterministic_inference=False)
        made = kind(1, torch.device("cpu"), max_adapters=ROWS, server_args=options)
        made.set_model((SHAPE,), torch.float32, max_rank=16, tp_size=1)
        return made

    def prepare(self, mode: str, ids: list[str | None], lengths: list[int]) -> Any:
        self.manager.prepare_lora_batch(
            SimpleNamespace(
                lora_ids=ids,
                batch_size=len(ids),
                forward_mode=self.host.mode[mode],
                extend_seq_lens=torch.tensor(lengths),
                extend_seq_lens_cpu=lengths,
                extend_prefix_lens_cpu=[0] * len(lengths),
                extend_num_tokens=sum(lengths),
            )
        )
        return self.manager.lora_backend.get_batch_info()

    def capture(self, mode: str, variant: str | None) -> Any:
        """What SGLang's runner captures a graph over, and which of two."""
        with (
            self.host.capture_mode.model_capture_mode(),
            self.host.capture_mode.capture_lora_variant(variant),
        ):
            return self.prepare(mode, [None] * ROWS, [1] * ROWS)

    def build_cache(self) -> None:
        self.manager.bind(self.world.residency, self.world.measured)
        generator = torch.Generator().manual_seed(1)
        layout = AdapterLayout.build(8, [SHAPE])
        for i in range(2):
            a, b = (torch.randn(*shape, generator=generator) for shape in ((8, WIDTH), (WIDTH, 8)))
            image = AdapterImage.build(layout, 2, lambda *_, m=(a, b): m, torch.float32, 0.5)
            name, size = adapter_id(i), image.nbytes
            self.world.residency.register(
                AdapterSource(name, name, layout, size, False, image=image)
            )

    def bring(self, name: str) -> None:
        self.world.arrive(name)
        self.world.step()
        self.world.step()


def run(backend: Any, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What SGLang's layers do with a backend."""
    for layer in (0, 1):
        a, b = (WeightRef(layer, SHAPE.name, (1, 16, WIDTH), x.device) for _ in range(2))
        backend.run_lora_b_sgemm(backend.run_lora_a_sgemm(x, a), b, base_output=output)
    return output


@pytest.fixture
def server(host: Any) -> Iterator[Server]:
    made = Server(host)
    with host.forward_over(made.world.pool):
        yield made


@pytest.fixture
def launches(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """The launches of LoRA kernels so far, each to be run again with its arguments and memory."""
    made: list[Callable[[], Any]] = []
    shrink, expand = host.triton_backend.lora_shrink, host.triton_backend.lora_expand

    def kept_shrink(*args: Any, **options: Any) -> torch.Tensor:
        inner: torch.Tensor = shrink(*args, **options)
        made.append(lambda: shrink(*args, **options, out=inner))
        return inner

    def kept_expand(*args: Any, **options: Any) -> torch.Tensor:
        made.append(lambda: expand(*args, **options))
        output: torch.Tensor = expand(*args, **options)
        return output

    monkeypatch.setattr(host.triton_backend, "lora_shrink", kept_shrink)
    monkeypatch.setattr(host.triton_backend, "lora_expand", kept_expand)
    return made


BATCHES: list[list[str | None]] = [
    [adapter_id(0), None, adapter_id(1)],  # while the copy of the second adapter is running
    [adapter_id(1)],
    [None, None],
    [adapter_id(1), adapter_id(1), None, adapter_id(0)],
]


@pytest.mark.parametrize("mode", ["DECODE", "EXTEND"])
def test_graphs_captured_before_the_cache_replay_later_batches(
    mode: str, server: Server, launches: list[Callable[[], Any]]
) -> None:
    manager, world = server.manager, server.world
    manager.init_prefill_cuda_graph_batch_info(max_num_tokens=ROWS, max_num_requests=ROWS)
    manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=ROWS, num_tokens_per_req=1)
    captured = server.capture(mode, "lora" if mode == "DECODE" else None)
    assert captured.graph and captured.has_active_lora, "the graph would have no LoRA kernels"
    x, output = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
    run(manager.lora_backend, x, output)
    graph = list(launches)
    assert len(graph) == 4 and not output.any()

    server.build_cache()
    server.bring(adapter_id(0))
    world.arrive(adapter_id(1))
    world.step()
    assert list(world.residency.copies) == [adapter_id(1)]
    generator = torch.Generator().manual_seed(0)
    reference = server.backend(server.host.torch_backend)
    for ids in BATCHES:
        x.copy_(torch.randn(ROWS, WIDTH, generator=generator))
        base = torch.randn(ROWS, WIDTH, generator=generator)
        output.copy_(base)
        waits = any(name in world.residency.copies for name in ids if name is not None)
        world.measured.batch_waited = False
        prepared = server.prepare(mode, ids, [1] * len(ids))
        assert world.measured.batch_waited == waits
        if mode == "DECODE" and not any(ids):
            assert prepared is None, "SGLang replays the graph without LoRA kernels"
        else:
            assert prepared.tables is captured.tables
            for launch in graph:
                launch()
        reference.set_batch(
            [(None if name is None else world.residency.paged(name), 1) for name in ids]
            + [(None, ROWS - len(ids))]
        )
        torch.testing.assert_close(output, run(reference, x, base.clone()), rtol=1e-5, atol=1e-3)
        differs = [not torch.equal(a, b) for a, b in zip(output, base, strict=True)]
        assert differs == [name is not None for name in ids] + [False] * (ROWS - len(ids))
        world.waiting.clear()
        world.step()
    world.check()


def test_decode_graphs_are_captured_with_and_without_lora_kernels(server: Server) -> None:
    """As SGLang's runner captures both, and replays by the adapters that a batch names."""
    manager = server.manager
    runner = object.__new__(server.host.decode_runner)
    runner.record_nolora_graph = server.host.skips(SimpleNamespace(lora_manager=manager))
    assert runner.record_nolora_graph
    manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=ROWS, num_tokens_per_req=1)
    active = {}
    for variant in ("lora", "nolora"):
        captured = server.capture("DECODE", variant)
        active[variant] = captured is not None and captured.has_active_lora
    assert active == {"lora": True, "nolora": False}

    server.build_cache()
    server.bring(adapter_id(0))
    for ids in ([None], [None] * ROWS, [adapter_id(0)], [None, adapter_id(0)]):
        prepared = server.prepare("DECODE", ids, [1] * len(ids))
        variant = runner._resolve_lora_variant(SimpleNamespace(lora_ids=ids))
        assert active[variant] == (prepared is not None and prepared.has_active_lora)


def test_batches_replayable_by_graphs_are_written_to_their_tables(server: Server) -> None:
    """Also prefill without adapters: the graph would use the previous batch's adapters."""
    server.manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=4, num_tokens_per_req=1)
    server.manager.init_prefill_cuda_graph_batch_info(max_num_tokens=16, max_num_requests=2)
    server.build_cache()
    server.bring(adapter_id(0))

    decode = server.prepare("DECODE", [adapter_id(0), None], [1, 1])
    assert decode.graph and decode.tables.num_tiles == 1 and decode.tables.rows[0] == 0
    assert server.prepare("DECODE", [None, None], [1, 1]) is None  # another graph's

    prefill = server.prepare("EXTEND", [adapter_id(0), None], [3, 9])
    assert prefill.graph and prefill.tables is not decode.tables
    assert prefill.tables.num_tiles == 1
    assert server.prepare("EXTEND", [None], [5]).tables is prefill.tables
    assert not prefill.tables.tiles.any()

    eager = server.prepare("EXTEND", [adapter_id(0)], [17])  # more tokens than any graph
    assert not eager.graph and eager.tables not in (decode.tables, prefill.tables)
    assert server.prepare("EXTEND", [None], [17]) is None
    assert server.prepare("DECODE", [None] * 5, [1] * 5) is None  # more requests than any graph
    assert server.prepare("DECODE", [adapter_id(0)] * 5, [1] * 5).tables.num_tiles == 1


@pytest.mark.parametrize("mode", ["DECODE", "EXTEND"])
def test_dummy_batches_larger_than_all_graphs_need_no_cache(mode: str, server: Server) -> None:
    """SGLang's warm-up runs a forward pass over base-model rows, with graphs or without."""
    assert server.prepare(mode, [None] * ROWS, [1] * ROWS) is None
    server.manager.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=4, num_tokens_per_req=1)
    assert server.prepare(mode, [None] * ROWS, [1] * ROWS) is None


def test_batch_with_adapters_before_the_cache_exists_is_refused(server: Server) -> None:
    with pytest.raises(AssertionError, match="before the KV cache is built"):
        server.prepare("DECODE", [adapter_id(0)], [1])
