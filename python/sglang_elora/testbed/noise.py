"""Random numbers that depend on a text only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise(text: str, shape: Sequence[int]) -> torch.Tensor:
    """Normal numbers, float32 of this shape, from a generator of their own that the text seeds."""
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(tuple(shape), generator=generator)
