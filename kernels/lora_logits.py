"""The second half of LoRA for the output layer: ``lora_expand`` with parts of B in all layers."""

from __future__ import annotations

import torch

from sglang_elora.kernels.batch_tables import BatchTables
from sglang_elora.kernels.launch_configs import ExpandConfig
from sglang_elora.kernels.lora_expand import launch
from sglang_elora.kernels.page_copy import PoolPlanes
from sglang_elora.kernels.stacked_module import StackedModule


def lora_logits(
    inner: torch.Tensor,
    pool: PoolPlanes,
    tables: BatchTables,
    module: StackedModule,
    output: torch.Tensor,
    *,
    vocab_size: int,
    num_tiles: int,
    config: ExpandConfig,
) -> torch.Tensor:
    """Add ``inner @ B^T`` of each row's adapter to the logits, in place. One launch.

    Args:
        inner: float32 ``[splits, T, width]`` of ``lora_shrink`` for the same module.
        pool: The pool's planes, in whose last B is.
        tables: The batch; rows without an adapter are not changed.
        module: The output layer; its ``out_features`` are the tokens of a layer's part.
        output: ``[T, vocab_size]`` or wider, of the weights' dtype, with adjacent columns.
        vocab_size: Tokens that B has rows for.
        num_tiles: Tiles to launch programs for: those of the batch, or the most it can have.
        config: Launch configuration.

    Returns:
        ``output``.
    """
    (part_size,) = module.out_features
    num_parts, num_layers = -(-vocab_size // part_size), len(pool.addresses)
    assert num_parts <= num_layers, (num_parts, num_layers)
    return launch(
        inner,
        pool.addresses,
        tables,
        module,
        output,
        parts=[min(part_size, vocab_size - i * part_size) for i in range(num_parts)],
        slot_elems=pool.slot_bytes // output.dtype.itemsize,
        num_tiles=num_tiles,
        config=config,
        num_planes=pool.addresses.shape[1],
        alignment=pool.alignment,
    )
