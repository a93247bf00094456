"""Reference of ``kernels/routed_tiles.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_elora.kernels.batch_tables import OFFSETS, RANK
from sglang_elora.kernels.stacked_module import StackedModule


def routed_tiles(
    records: Sequence[Sequence[int]],
    row_adapters: Sequence[int],
    topk_ids: torch.Tensor,
    modules: Sequence[StackedModule],
) -> list[list[int] | None]:
    """Per route, the record of its adapter with the offsets of its expert; None if it has no tile.

    Args:
        records: Per adapter, its record of int32.
        row_adapters: Per row of the batch, the index of its adapter, or -1 for the base model.
        topk_ids: Integers ``[T, k]``; rows after those of the batch have no adapter.
        modules: The modules with experts.
    """
    routed: list[list[int] | None] = []
    for row, experts in enumerate(topk_ids.tolist()):
        adapter = row_adapters[row] if row < len(row_adapters) else -1
        for expert in experts:
            if adapter < 0 or not 0 <= expert < modules[0].num_experts:
                routed.append(None)
                continue
            record = list(records[adapter])
            for module in modules:
                position = OFFSETS + 2 * module.index
                for which, elems in enumerate((module.a_block, module.b_block)):
                    if record[position + which] >= 0:
                        record[position + which] += expert * record[RANK] * elems
            routed.append(record)
    return routed
