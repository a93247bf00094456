"""LoRA on the embedding and the output layer, in parts spread over the decoder layers, against
plain torch.

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
    EMBEDDING,
    OUTPUT_LAYER,
    AdapterImage,
    AdapterLayout,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    SlotTable,
    VocabularyModule,
    WeightRef,
)
from tests.harness.tolerances import TOLERANCES

HIDDEN, NUM_LAYERS = 96, 3
PROJECTION = ModuleShape("o_proj", HIDDEN, (HIDDEN,))
VOCABULARIES = (70, 192, 400)  # one layer has tokens; each has whole tiles; the last has a rest


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 32000])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
@pytest.mark.parametrize("name", [EMBEDDING, OUTPUT_LAYER])
def test_parts_of_the_vocabulary_are_all_tokens_once(
    name: str, vocab_size: int, num_layers: int
) -> None:
    module = VocabularyModule(name, 8, vocab_size, num_layers)
    whole = torch.arange(vocab_size, dtype=torch.float32)[:, None]
    hidden = torch.ones(8, 1)
    if name == EMBEDDING:
        stored = [module.part_of(layer, whole.T, hidden) for layer in range(num_layers)]
        parts, copies = [a.T for a, _ in stored], [b for _, b in stored]
    else:
        stored = [module.part_of(layer, hidden.T, whole) for layer in range(num_layers)]
        parts, copies = [b for _, b in stored], [a.T for a, _ in stored]
    assert all(torch.equal(copy, hidden) for copy in copies)
    assert {len(part) for part in parts} == {module.part_size}
    assert torch.equal(torch.cat(parts)[:vocab_size], whole)
    assert not torch.cat(parts)[vocab_size:].any()
    starts = [start for start, _ in module.parts]
    assert starts == [layer * module.part_size for layer in range(len(module.parts))]
    assert module.parts[-1][1] == vocab_size


class World:
    """Adapters in scattered slots. Of four, one has weights for the embedding, one for the output
    layer, one for both, one for neither."""

    def __init__(self, vocab_size: int, ranks: Sequence[int], dtype: torch.dtype) -> None:
        rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
        planes = [[torch.zeros(6000, 2, 32, dtype=dtype) for _ in range(NUM_LAYERS)] for _ in "kv"]
        self.pool = SimpleNamespace(k_buffer=planes[0], v_buffer=planes[1])
        self.vocab_size, self.dtype = vocab_size, dtype
        self.vocabulary = {
            name: VocabularyModule(name, HIDDEN, vocab_size, NUM_LAYERS)
            for name in (EMBEDDING, OUTPUT_LAYER)
        }
        self.shapes = (*(module.shape for module in self.vocabulary.values()), PROJECTION)
        self.paged = list[PagedAdapter]()
        self.weights: list[dict[str, torch.Tensor]] = []  # scaling * B @ A
        pool, numbers = KVPlanes(tuple(planes), dtype), rng.sample(range(1, 6000), 5999)
        for i, rank in enumerate(ranks):
            made = {}
            for name, sizes in (
                (EMBEDDING, (vocab_size, HIDDEN)),
                (OUTPUT_LAYER, (HIDDEN, vocab_size)),
                (PROJECTION.name, (HIDDEN, HIDDEN)),
            ):
                a = torch.randn(rank, sizes[0], generator=generator).to(dtype)
                made[name] = a, (torch.randn(sizes[1], rank, generator=generator) / rank).to(dtype)
            has = {EMBEDDING: i % 4 in (0, 2), OUTPUT_LAYER: i % 4 in (0, 1)}
            layout = AdapterLayout.build(rank, [s for s in self.shapes if has.get(s.name, True)])

            def matrices(layer: int, name: str, made: Any = made) -> Any:
                if name in self.vocabulary:
                    return self.vocabulary[name].part_of(layer, *made[name])
                return made[name]

            image = AdapterImage.build(layout, NUM_LAYERS, matrices, dtype, 0.5)
            slots = [numbers.pop() for _ in range(layout.num_slots(pool.slot_elems, 1))]
            table = SlotTable(torch.tensor(slots))
            pool.write(table, image)
            self.paged.append(PagedAdapter(layout, table, pool, 0.5))
            self.weights.append(
                {
                    name: 0.5 * b.float() @ a.float()
                    for name, (a, b) in made.items()
                    if has.get(name)
                }
            )

    def segments(self, rows: Sequence[tuple[int | None, int]]) -> list[Any]:
        return [(None if i is None else self.paged[i], count) for i, count in rows]

    def expected(
        self,
        module: str,
        rows: Sequence[tuple[int | None, int]],
        x: torch.Tensor,
        base: torch.Tensor,
    ) -> torch.Tensor:
        """``x``: hidden states; one-hot rows for the embedding, zero outside the vocabulary."""
        output, row = base.float().clone(), 0
        for i, count in rows:
            weight = None if i is None else self.weights[i].get(module)
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
    backend.vocabulary = world.vocabulary
    return backend


def weights_of(module: str) -> WeightRef:
    return WeightRef(0, module, (), torch.device("cpu"))


def forward_over(world: World) -> Any:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    return forward_context(
        ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=world.pool))
    )


def run(backend: Any, world: World, x: torch.Tensor, base: torch.Tensor, info: Any) -> torch.Tensor:
    """What SGLang's ``ParallelLMHeadWithLoRA.apply_lora`` does with a backend."""
    assert info is None or info.expected_tokens == len(x)
    weights = weights_of(OUTPUT_LAYER)
    with forward_over(world):
        inner = backend.run_lora_a_sgemm(x, weights, pruned_batch_info=info)
        output: torch.Tensor = backend.run_lora_b_sgemm(
            x=inner, weights=weights, base_output=base, pruned_batch_info=info
        )
    return output


def embed(backend: Any, world: World, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What SGLang's ``VocabParallelEmbeddingWithLoRA.apply_lora`` does with a backend."""
    weights = weights_of(EMBEDDING)
    with forward_over(world):
        inner = backend.run_lora_a_embedding(
            input_ids=tokens, weights=weights, vocab_size=world.vocab_size, extra_embeddings=None
        )
        output: torch.Tensor = backend.run_lora_b_sgemm(x=inner, weights=weights, base_output=base)
    return output


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_embeddings_equal_those_of_the_whole_matrices(
    vocab_size: int, dtype: torch.dtype, name: str, classes: dict[str, Any]
) -> None:
    """Tokens outside the vocabulary, as of images, and rows after the batch get nothing."""
    world = World(vocab_size, [8, 16, 24, 3, 1, 5, 32], dtype)
    backend = backend_over(world, classes[name])
    prompts = [(0, 25), (None, 3), (1, 4), (2, 30), (6, 1), (3, 2), (4, 1), (0, 6)]
    num_rows = sum(count for _, count in prompts)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (num_rows + 2,), generator=generator)
    tokens[3], tokens[5], tokens[31:34] = vocab_size, 1 << 40, torch.tensor([0, vocab_size - 1, -1])
    one_hot = torch.zeros(num_rows + 2, vocab_size)
    known = (tokens >= 0) & (tokens < vocab_size)
    one_hot[known.nonzero().flatten(), tokens[known]] = 1
    base = torch.randn(num_rows + 2, HIDDEN, generator=generator).to(dtype)
    expected = world.expected(EMBEDDING, prompts, one_hot, base)
    backend.set_batch(world.segments(prompts))
    output = embed(backend, world, tokens, base)
    assert output.data_ptr() == base.data_ptr(), "added in place"
    rtol, atol = TOLERANCES[dtype].values()
    scale = float(expected.abs().max())
    torch.testing.assert_close(output.float(), expected, rtol=rtol, atol=atol * scale)


def test_batch_without_an_adapted_embedding_keeps_the_base_embeddings(
    name: str, classes: dict[str, Any]
) -> None:
    world = World(192, [8, 16, 24, 3], torch.float32)
    backend = backend_over(world, classes[name])
    backend.set_batch(world.segments([(1, 3), (None, 2), (3, 1)]))
    base = torch.randn(6, HIDDEN)
    assert torch.equal(embed(backend, world, torch.arange(6), base.clone()), base)


class Copy:
    """Of an adapter, under way. ``waits`` are the layers waited for; None is all."""

    def __init__(self) -> None:
        self.waits: list[int | None] = []

    def wait(self) -> None:
        self.waits.append(None)

    def wait_layer(self, layer: int) -> None:
        self.waits.append(layer)


@pytest.mark.parametrize("module", [EMBEDDING, OUTPUT_LAYER])
def test_vocabulary_modules_wait_for_the_whole_copies(
    module: str, name: str, classes: dict[str, Any]
) -> None:
    """The parts are in all layers. A batch whose adapters lack the module does not wait."""
    world, copy = World(192, [8, 16, 24, 3], torch.float32), Copy()
    backend = backend_over(world, classes[name])
    for adapter, waits in ((0, [None]), (3, [])):
        copy.waits.clear()
        backend.await_copies([copy], None)
        backend.set_batch(world.segments([(adapter, 2)]))
        if module == EMBEDDING:
            embed(backend, world, torch.arange(2), torch.zeros(2, HIDDEN))
        else:
            run(backend, world, torch.zeros(2, HIDDEN), torch.zeros(2, 192), None)
        assert copy.waits == waits


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
        expected = world.expected(OUTPUT_LAYER, rows, x, base)
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
    expected = world.expected(OUTPUT_LAYER, rows, x, base)
    infos = backend.lm_head_pass_batch_infos
    assert [info.expected_tokens for info in infos] == [4, 4, 4, 2]
    for number, info in enumerate(infos):
        part = slice(4 * number, 4 * number + info.expected_tokens)
        run(backend, world, x[part], base[part], info)
    torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-4)
    backend.set_output_rows(None)
    assert backend.lm_head_batch_info is None and backend.lm_head_pass_batch_infos is None
