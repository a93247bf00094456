"""What SGLang's LoRA layers hold where they expect a slab."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Names A or B of one module of one layer. Layers ask it for shape and device, no more.

    ``shape`` is that of the slab: ``[adapters, parts * largest rank, in]`` for A and
    ``[adapters, out, largest rank]`` for B.
    """

    layer: int
    module: str
    shape: tuple[int, ...]
    device: torch.device
