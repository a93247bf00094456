"""LoRA on the output layer, in parts spread over the decoder layers, against plain torch.

Through ``elora_torch`` and ``elora_triton``, whose kernels run under Triton's interpreter.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import (
    OUTPUT_LAYER,
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    OutputLayer,
    PagedAdapter,
    SlotTable,
    WeightRef,
)
from tests.harness.tolerances import TOLERANCES

HIDDEN, NUM_LAYERS = 96, 3
PROJECTION = ModuleShape("o_proj", HIDDEN, (HIDDEN,))
VOCABULARIES = (70, 192, 400)  # one layer has tokens; each has whole tiles; the last has a rest


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 32000])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
def test_parts_of_the_output_layer_are_all_tokens_once(vocab_size: int, num_layers: int) -> None:
    output_layer = OutputLayer(8, vocab_size, num_layers)
    b = torch.arange(vocab_size, dtype=torch.float32)[:, None]
    parts = [output_layer.part_of(layer, b) for layer in range(num_layers)]
    assert {len(part) for part in parts} == {output_layer.part_size}
    assert torch.equal(torch.cat(parts)[:vocab_size], b)
    assert not torch.cat(parts)[vocab_size:].any()
    assert [start for start, _ in output_layer.parts] == [
        layer * output_layer.part_size for layer in range(len(output_layer.parts))
    ]
    assert output_layer.parts[-1][1] == vocab_size


class World:
    """Adapters in scattered slots; every second has weights for the output layer."""

    def __init__(self, vocab_size: int, ranks: Sequence[int], dtype: torch.dtype) -> None:
        rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
        planes = [[torch.zeros(4000, 2, 32, dtype=dtype) for _ in range(NUM_LAYERS)] for _ in "kv"]
        self.pool = SimpleNamespace(k_buffer=planes[0], v_buffer=planes[1])
        self.output_layer = OutputLayer(HIDDEN, vocab_size, NUM_LAYERS)
        self.shapes = (self.output_layer.shape, PROJECTION)
        self.dtype, self.paged = dtype, list[PagedAdapter]()
        self.weights: list[torch.Tensor | None] = []  # scaling * B @ A
        pool, numbers = KVPlanes(tuple(planes), dtype), rng.sample(range(1, 4000), 3999)
        for i, rank in enumerate(ranks):
            a = torch.randn(rank, HIDDEN, generator=generator).to(dtype)
            b = (torch.randn(vocab_size, rank, generator=generator) / rank).to(dtype)
            plain = (a, torch.zeros(HIDDEN, rank, dtype=dtype))
            shapes = self.shapes if i % 2 == 0 else (PROJECTION,)
            layout = AdapterLayout.build(rank, shapes)

            def matrices(layer: int, name: str, a: Any = a, b: Any = b, plain: Any = plain) -> Any:
                if name == OUTPUT_LAYER:
                    return a, self.output_layer.part_of(layer, b)
                return plain

            image = AdapterImage.build(layout, NUM_LAYERS, matrices, dtype, 0.5)
            slots = [numbers.pop() for _ in range(layout.num_slots(pool.slot_elems, 1))]
            table = SlotTable(torch.tensor(slots))
            pool.write(table, image)
            self.paged.append(PagedAdapter(layout, table, pool, 0.5))
            has = len(shapes) == 2
            self.weights.append(0.5 * b.float() @ a.float() if has else None)

    def segments(self, rows: Sequence[tuple[int | None, int]]) -> list[Any]:
        return [(None if i is None else self.paged[i], count) for i, count in rows]

    def expected(
        self, rows: Sequence[tuple[int | None, int]], x: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        output, row = base.float().clone(), 0
        for i, count in rows:
            weight = None if i is None else self.weights[i]
            if weight is not None:
                output[row : row + count, : len(weight)] += x[row : row + count].float() @ weight.T
            row += count
        return output


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
        from sglang_elora.srt.lora.triton_backend import EloraTritonBackend
    return {"elora_torch": EloraTorchBackend, "elora_triton": EloraTritonBackend}


@pytest.fixture(params=["elora_torch", "elora_triton"])
def name(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    return backend


def backend_over(world: World, cls: Any) -> Any:
    arguments = SimpleNamespace(enable_deterministic_inference=False)
    backend = cls(1, torch.device("cpu"), max_adapters=64, server_args=arguments)
    backend.set_model(world.shapes, world.dtype, max_rank=64, tp_size=1)
    backend.output_layer = world.output_layer
    return backend


def run(backend: Any, world: World, x: torch.Tensor, base: torch.Tensor, info: Any) -> torch.Tensor:
    """What SGLang's ``ParallelLMHeadWithLoRA.apply_lora`` does with a backend."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    assert info is None or info.expected_tokens == len(x)
    vocab_size = world.output_layer.vocab_size
    a = WeightRef(0, OUTPUT_LAYER, (1, 64, HIDDEN), x.device)
    b = WeightRef(0, OUTPUT_LAYER, (1, vocab_size, 64), x.device)
    context = ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=world.pool))
    with forward_context(context):
        inner = backend.run_lora_a_sgemm(x, a, pruned_batch_info=info)
        output: torch.Tensor = backend.run_lora_b_sgemm(
            x=inner, weights=b, base_output=base, pruned_batch_info=info
        )
    return output


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_logits_equal_those_of_the_whole_matrices(
    vocab_size: int, dtype: torch.dtype, name: str, classes: dict[str, Any]
) -> None:
    """For all rows of a batch, as in decode, and for some, as in prefill. Logits may be wider than
    the vocabulary, which SGLang pads."""
    world = World(vocab_size, [8, 16, 24, 3], dtype)
    backend = backend_over(world, classes[name])
    generator = torch.Generator().manual_seed(1)
    prompts = [(0, 5), (None, 3), (1, 2), (2, 1), (0, 1)]
    last = [(i, 1) for i, _ in prompts]
    backend.set_batch(world.segments(prompts))
    for rows, reach in ((prompts, None), (last, world.segments(last))):
        backend.set_output_rows(reach)
        num_rows = sum(count for _, count in rows)
        x = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
        base = torch.randn(num_rows, vocab_size + 7, generator=generator).to(dtype)
        expected = world.expected(rows, x, base)
        before = base.clone()
        output = run(backend, world, x, base, backend.lm_head_batch_info)
        assert output.data_ptr() == base.data_ptr(), "added in place"
        rtol, atol = TOLERANCES[dtype].values()
        scale = float(expected.abs().max())
        torch.testing.assert_close(output.float(), expected, rtol=rtol, atol=atol * scale)
        assert torch.equal(output[:, vocab_size:], before[:, vocab_size:])


def test_logits_computed_in_passes_use_each_pass_rows(
    name: str, classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_ENABLE_LOGPROB_CHUNK", "true")
    monkeypatch.setenv("SGLANG_LOGPROB_CHUNK_SIZE", "4")
    world = World(192, [8, 16, 24], torch.float32)
    backend = backend_over(world, classes[name])
    rows = [(0, 3), (None, 2), (2, 6), (1, 1), (0, 2)]
    backend.set_batch(world.segments(rows))
    backend.set_output_rows(world.segments(rows))
    x, base = torch.randn(14, HIDDEN), torch.randn(14, 192)
    expected = world.expected(rows, x, base)
    infos = backend.lm_head_pass_batch_infos
    assert [info.expected_tokens for info in infos] == [4, 4, 4, 2]
    for number, info in enumerate(infos):
        part = slice(4 * number, 4 * number + info.expected_tokens)
        run(backend, world, x[part], base[part], info)
    torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-4)
    backend.set_output_rows(None)
    assert backend.lm_head_batch_info is None and backend.lm_head_pass_batch_infos is None
