"""Random numbers that depend only on a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise(text: str, shape: Sequence[int]) -> torch.Tensor:
    """Normally distributed float32 tensor of this shape, from a generator seeded by ``text``."""
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(tuple(shape), generator=generator)
