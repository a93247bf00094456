"""``lora_lookup`` of the embedding with adapters in scattered and in contiguous slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.shapes import Case
from benchmarks.kernels.world import NUM_TOKENS, vocabulary_world
from sglang_elora.kernels import lora_lookup
from sglang_elora.pages import EMBEDDING, PagedAdapter


def works(
    case: Case, device: torch.device, hidden_size: int = 4096, num_tokens: int = NUM_TOKENS
) -> dict[str, Callable[[], object]]:
    """Each looks up the rows of a batch once, in all layers of a pool for the embedding alone."""
    world, vocab_size = vocabulary_world(EMBEDDING, case, device, hidden_size, num_tokens)
    module = world.modules[EMBEDDING]
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(vocab_size, (case.num_rows,), generator=generator, device=device)

    def over(adapters: list[PagedAdapter]) -> Callable[[], object]:
        tables = world.tables(adapters, 16 if case.phase == "decode" else 64)

        def work() -> torch.Tensor:
            return lora_lookup(
                tokens,
                world.planes.pool_planes,
                tables,
                module,
                vocab_size=vocab_size,
                dtype=torch.bfloat16,
                width=module.inner_width(max(case.ranks)),
                num_tiles=tables.num_tiles,
            )

        return work

    return {
        "lookup/scattered": over(world.scattered),
        "lookup/contiguous": over(world.contiguous),
    }
