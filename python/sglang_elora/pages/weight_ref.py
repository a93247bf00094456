"""Placeholder that SGLang's LoRA layers hold in place of a weight buffer of its LoRA pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Reference to A or B of one module in one layer. Layers only read its shape and device.

    ``layer`` is that of the pool, ``module`` the name of the ``ModuleShape`` there (``LayerPlan``).
    ``shape`` is that of SGLang's buffer: ``[adapters, parts * largest rank, in]`` for A and
    ``[adapters, out, largest rank]`` for B.
    """

    layer: int
    module: str
    shape: tuple[int, ...]
    device: torch.device
