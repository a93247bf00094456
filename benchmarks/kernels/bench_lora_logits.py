"""``lora_logits`` of the output layer, and a launch of ``lora_expand`` per layer in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.shapes import Case
from benchmarks.kernels.world import NUM_TOKENS, vocabulary_world
from sglang_elora.kernels import expand_config, lora_expand, lora_logits
from sglang_elora.pages import OUTPUT_LAYER, PagedAdapter


def works(
    case: Case, device: torch.device, hidden_size: int = 4096, num_tokens: int = NUM_TOKENS
) -> dict[str, Callable[[], object]]:
    """Each adds to the logits of the last row of each request; in prefill that is one per
    adapter."""
    decode = case if case.phase == "decode" else Case("decode", *[case.num_adapters] * 2, "16")
    world, vocab_size = vocabulary_world(OUTPUT_LAYER, decode, device, hidden_size, num_tokens)
    module, rows = world.modules[OUTPUT_LAYER], decode.num_rows
    (part_size,) = module.out_features
    width = module.inner_width(max(decode.ranks))
    inner = torch.zeros(1, rows, width, device=device)
    output = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=device)

    def over(adapters: list[PagedAdapter], one_launch: bool) -> Callable[[], object]:
        tables = world.tables(adapters, 16)
        features = vocab_size if one_launch else part_size
        config = expand_config(device, 16, tables.num_tiles, features)

        def in_one() -> torch.Tensor:
            return lora_logits(
                inner,
                world.planes.pool_planes,
                tables,
                module,
                output,
                vocab_size=vocab_size,
                num_tiles=tables.num_tiles,
                config=config,
            )

        def by_layer() -> torch.Tensor:
            for layer in range(world.num_layers):
                lora_expand(
                    inner,
                    world.planes.plane(-1, layer),
                    tables,
                    module,
                    output[:, layer * part_size : (layer + 1) * part_size],
                    num_tiles=tables.num_tiles,
                    config=config,
                )
            return output

        return in_one if one_launch else by_layer

    return {
        "logits/scattered": over(world.scattered, one_launch=True),
        "logits/contiguous": over(world.contiguous, one_launch=True),
        "logits/by layer": over(world.scattered, one_launch=False),
    }
