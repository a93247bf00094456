"""``lora_lookup`` of the embedding with adapters in scattered and in contiguous slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.shapes import Case
from benchmarks.kernels.world import MAX_LAYERS, CaseWorld
from sglang_elora.kernels import lora_lookup
from sglang_elora.pages import EMBEDDING, PagedAdapter, VocabularyModule

NUM_TOKENS = 128_256  # Llama 3


def works(
    case: Case, device: torch.device, hidden_size: int = 4096, num_tokens: int = NUM_TOKENS
) -> dict[str, Callable[[], object]]:
    """Each looks up the rows of a batch once, in all layers of a pool for the embedding alone."""
    part = VocabularyModule(EMBEDDING, hidden_size, num_tokens, MAX_LAYERS)
    world = CaseWorld.build(case, device, (part.shape,))
    module, vocab_size = world.modules[EMBEDDING], world.num_layers * part.part_size
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(vocab_size, (case.num_rows,), generator=generator, device=device)

    def over(adapters: list[PagedAdapter]) -> Callable[[], object]:
        tables = world.tables(adapters, 16 if case.phase == "decode" else 64)

        def work() -> torch.Tensor:
            return lora_lookup(
                tokens,
                world.planes.addresses,
                tables,
                module,
                vocab_size=vocab_size,
                slot_elems=world.planes.slot_elems,
                dtype=torch.bfloat16,
                width=module.inner_width(max(case.ranks)),
                num_tiles=tables.num_tiles,
            )

        return work

    return {
        "lookup/scattered": over(world.scattered),
        "lookup/contiguous": over(world.contiguous),
    }
