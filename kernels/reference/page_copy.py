"""Reference of ``kernels/page_copy.py``; also used on devices without Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def page_copy(
    planes: Sequence[Sequence[torch.Tensor]],
    memory: torch.Tensor,
    slots: torch.Tensor,
    plane_bytes: Sequence[int],
    *,
    to_pool: bool,
) -> None:
    """Copy one adapter or one run of KV into its slots, or out of them, layer by layer.

    Args:
        planes: ``planes[plane][layer]``: uint8 ``[slots, slot_bytes]``.
        memory: uint8 ``[layers, sum of plane_bytes]`` on the same device.
        slots: int64 or int32 ``[num_slots]``.
        plane_bytes: Bytes used of each plane.
    """
    slots = slots.long()
    begin = 0
    for layers, size in zip(planes, plane_bytes, strict=True):
        for pool, line in zip(layers, memory, strict=True):
            slot_bytes = pool.shape[1]
            full, rest = divmod(size, slot_bytes)
            end = begin + full * slot_bytes
            whole, tail = line[begin:end].view(full, slot_bytes), line[end : end + rest]
            if to_pool:
                pool.index_copy_(0, slots[:full], whole)
                if rest:
                    pool[:, :rest].index_copy_(0, slots[full : full + 1], tail.view(1, rest))
            else:
                torch.index_select(pool, 0, slots[:full], out=whole)
                if rest:
                    tail.copy_(pool[:, :rest].index_select(0, slots[full : full + 1])[0])
        begin += size
