"""What both LoRA kernels are tested over: modules, batches, and odd corners."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from sglang_elora.pages import ModuleShape

QKV = ModuleShape("qkv_proj", 96, (128, 64, 64))
GATE_UP = ModuleShape("gate_up_proj", 100, (70, 33))  # nothing here is a multiple of a tile
OUT = ModuleShape("o_proj", 128, (96,))
SHAPES = (QKV, GATE_UP, OUT)
RANKS = (1, 8, 24, 64, 128)
POOLS = [
    (torch.bfloat16, 192),
    (torch.bfloat16, 288),  # chunks of 32
    (torch.bfloat16, 1024),
    (torch.uint8, 64),  # fp8 KV: a slot holds half a tile of weights
    (torch.uint8, 1024),
    (torch.float32, 80),
]
"""Of bfloat16 weights: dtype and elements of a slot."""

Segments = Sequence[tuple[int, int]]


def zipf(num_adapters: int, num_rows: int) -> Segments:
    """Rows one by one, adapter i drawn with weight 1 / (i + 1); base rows among them."""
    rng = random.Random(num_adapters)
    weights = [1 / (i + 1) for i in range(num_adapters)]
    return [
        (-1 if rng.random() < 0.1 else rng.choices(range(num_adapters), weights)[0], 1)
        for _ in range(num_rows)
    ]


MIXES: dict[str, tuple[list[int], Segments]] = {
    "one adapter": ([24], [(0, 5)]),
    "every rank": (list(RANKS), [(i, 3) for i in range(len(RANKS))]),
    "more rows than a tile": ([8, 24], [(0, 37), (1, 16), (0, 1)]),
    "interleaved": ([8, 24, 3], [(0, 2), (1, 1), (0, 3), (2, 1), (1, 1), (0, 1)]),
    "base rows around": ([8, 24], [(-1, 3), (0, 4), (-1, 1), (1, 2), (-1, 2)]),
    "base rows only": ([8], [(-1, 4)]),
    "no rows": ([8], [(0, 0)]),
    "no segments": ([8], []),
    "adapters without rows": ([8, 24, 64], [(2, 2)]),
    "sixteen distinct": ([1 + 4 * i for i in range(16)], [(i * 7 % 16, 1) for i in range(16)]),
    "sixty-four distinct": ([8 + i % 3 for i in range(64)], [(63 - i, 1) for i in range(64)]),
    "zipf": ([8, 1, 24, 16, 5, 8, 3, 64], zipf(8, 40)),
    "zipf over sixty-four": ([(8, 1, 24, 3)[i % 4] for i in range(64)], zipf(64, 90)),
}


def lacks(adapter: int, name: str) -> bool:
    """Every third adapter lacks a module."""
    return adapter % 3 == 2 and name == "gate_up_proj"
