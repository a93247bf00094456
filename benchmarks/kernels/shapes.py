"""Cases of the kernel benchmarks: Llama-3-8B's linear layers and Qwen3-30B-A3B's experts; decode
and prefill batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A GPU machine has a copy of the checkout in which nothing is installed (benchmarks/gpu/TODO.md).
if str(ROOT / "python") not in sys.path:
    sys.path.insert(0, str(ROOT / "python"))

import sglang_elora  # noqa: E402

if str(ROOT) not in sglang_elora.__path__:
    sglang_elora.__path__.append(str(ROOT))  # kernels/ is sglang_elora.kernels

from sglang_elora.pages import ModuleShape  # noqa: E402

NUM_LAYERS = 32
SLOT_ELEMS = 8 * 128  # KV heads times head dimension
MODULES = (
    ModuleShape("qkv_proj", 4096, (4096, 1024, 1024)),
    ModuleShape("o_proj", 4096, (4096,)),
    ModuleShape("gate_up_proj", 4096, (14336, 14336)),
    ModuleShape("down_proj", 14336, (4096,)),
)
EXPERTS = (
    ModuleShape("gate_up_proj_moe", 2048, (768, 768), 128),
    ModuleShape("down_proj_moe", 768, (2048,), 128),
)
EXPERTS_PER_ROW = 8
EXPERT_SLOT_ELEMS = 4 * 128  # of the model with these experts
RANKS = {"16": (16,), "64": (64,), "mixed": (8, 16, 32, 64)}
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL_ROWS = (512, 2048, 8192, 16384)
NUM_ADAPTERS = (1, 8, 64)
EXPERT_ROWS = {"decode": (1, 8, 32, 64, 128, 256), "prefill": (512, 2048, 8192)}
EXPERT_ADAPTERS = (1, 32)


@dataclass(frozen=True, slots=True)
class Case:
    """One batch.

    Args:
        phase: ``decode``: rows dealt to adapters in turn. ``prefill``: adjacent rows each.
        num_rows: Token rows.
        num_adapters: Distinct adapters, all with rows.
        rank_mix: Key of RANKS; adapter i has rank ``RANKS[rank_mix][i % len]``.
    """

    phase: str
    num_rows: int
    num_adapters: int
    rank_mix: str

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.num_rows}x{self.num_adapters}-rank-{self.rank_mix}"

    @property
    def ranks(self) -> list[int]:
        mix = RANKS[self.rank_mix]
        return [mix[i % len(mix)] for i in range(self.num_adapters)]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """``(adapter, rows)`` in row order."""
        if self.phase == "decode":
            return [(row % self.num_adapters, 1) for row in range(self.num_rows)]
        rows = self.rows_per_adapter
        return list(enumerate(rows))

    @property
    def rows_per_adapter(self) -> list[int]:
        share, rest = divmod(self.num_rows, self.num_adapters)
        return [share + (i < rest) for i in range(self.num_adapters)]


def cases() -> Iterator[Case]:
    """All cases; those with performance targets are first."""
    decode = [
        Case("decode", rows, adapters, mix)
        for mix in ("mixed", "16", "64")
        for rows in reversed(DECODE_ROWS)
        for adapters in sorted({n for n in NUM_ADAPTERS if n <= rows} | {min(rows, 64)})
    ]
    prefill = [
        Case("prefill", rows, adapters, mix)
        for mix in ("mixed", "16", "64")
        for rows in PREFILL_ROWS
        for adapters in NUM_ADAPTERS
    ]
    yield from (case for case in decode if case.num_rows >= 64)
    yield from prefill
    yield from (case for case in decode if case.num_rows < 64)


def expert_cases() -> Iterator[Case]:
    """Cases of a layer of experts. Rows of decode are on both sides of ``MOST_SINGLE_ROUTES``."""
    for phase, all_rows in EXPERT_ROWS.items():
        for rows in all_rows:
            for adapters in sorted({min(rows, n) for n in EXPERT_ADAPTERS}):
                yield Case(phase, rows, adapters, "16")
