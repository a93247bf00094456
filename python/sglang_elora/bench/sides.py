"""The compared servers ("sides") by name, all with the same bytes on the device.

``side_names`` has the grammar of names. Stock's adapter slots have the size of the largest rank;
the remaining bytes are its KV pool. All sides but ``stock-default``, which has no host tier unless
it is named ``stock-default+hicache``, have the same bytes of KV on the host. Adapters on the host
are outside of both. ``vllm:N`` and ``vllm:N+grouped`` are vLLM with N adapter slots
(``vllm.side``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_elora.bench.apis import Native, Open
from sglang_elora.bench.side_names import (
    STOCK_VARIANTS,
    TUNED,
    WRITE_POLICIES,
    parse_side,
)
from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec
from sglang_elora.testbed.checkpoint import ModelShape
from sglang_elora.testbed.server import ELORA_SERVER, python_module
from sglang_elora.workloads import STOCK_DEFAULT_SLOTS, adapter_name

RANKS = (8, 16, 24, 32, 48, 64)
SHAPE = ModelShape(num_kv_heads=4)
"""Shape of the measured model. 1,000 tokens of prefill take about 150 ms on one core, six times as
long as an empty step. With four KV heads an adapter of rank 32 takes as many slots (512) as a short
chat has tokens; for an 8B model (1,280 slots) and its longer chats the proportion is the same."""

_FLOAT32 = 4
_STOCK = python_module("sglang.launch_server")


def adapter_specs(count: int) -> list[AdapterSpec]:
    """Adapters on all linear layers with cyclic ranks, so that popular ones have every rank."""
    return [
        AdapterSpec(adapter_name(i), rank, rank, ALL_LINEAR, seed=i)
        for i, rank in zip(range(count), RANKS * count, strict=False)
    ]


def adapter_bytes(rank: int, shape: ModelShape) -> int:
    """Bytes of an adapter on all linear layers; also of one of stock's slots for that rank."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    a_rows = 3 * hidden + heads + 2 * hidden + mlp
    b_rows = heads + 2 * kv + hidden + 2 * mlp + hidden
    return shape.num_layers * rank * (a_rows + b_rows) * _FLOAT32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Memory sizes of all sides: device bytes are those of stock's default; ``host_share`` is the
    size of the host tier, where a side has one, relative to the device bytes."""

    stock_kv_tokens: int = 6_144  # in addition to STOCK_DEFAULT_SLOTS adapter slots
    host_share: float = 2.0
    num_layers: int = SHAPE.num_layers

    @property
    def shape(self) -> ModelShape:
        return replace(SHAPE, num_layers=self.num_layers)

    @property
    def adapter_slot_bytes(self) -> int:
        """Bytes of one of stock's adapter slots, which have the size of the largest rank."""
        return adapter_bytes(max(RANKS), self.shape)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's KV."""
        return 2 * self.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * _FLOAT32

    @property
    def total_bytes(self) -> int:
        kv_bytes = self.stock_kv_tokens * self.slot_bytes
        return STOCK_DEFAULT_SLOTS * self.adapter_slot_bytes + kv_bytes

    @property
    def pool_slots(self) -> int:
        """Slots of ELORA's pool."""
        return self.total_bytes // self.slot_bytes

    @property
    def host_tokens(self) -> int:
        return round(self.host_share * self.pool_slots)

    def kv_tokens(self, num_slots: int) -> int:
        """Tokens of KV that ``num_slots`` adapter slots leave; zero or negative if none."""
        return (self.total_bytes - num_slots * self.adapter_slot_bytes) // self.slot_bytes

    def facts(self) -> dict[str, Any]:
        return {
            "total_device_bytes": self.total_bytes,
            "pool_slots": self.pool_slots,
            "stock_kv_tokens": self.stock_kv_tokens,
            "host_kv_tokens": self.host_tokens,
            "slot_bytes": self.slot_bytes,
            "largest_adapter_bytes": self.adapter_slot_bytes,
            "num_layers": self.num_layers,
            "ranks": RANKS,
        }


@dataclass(frozen=True, slots=True)
class Side:
    """A server to start: ``program`` with ``flags`` added to the common ones, and plugins.

    ``stock_variants`` are functions of ``stock.variants``, ``variants`` of the benchmark's file.
    """

    name: str
    program: Sequence[str]
    flags: tuple[str, ...]
    stock_variants: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    names_sessions: bool = False
    threads: int | None = None  # of OpenMP; None: the CPU platform's default
    open: Open = Native
    flush: str = "/flush_cache?timeout=30"  # path that empties the cache


def make_side(name: str, sizes: Sizes, num_adapters: int, longest: int) -> Side:
    """The side of that name.

    Args:
        longest: Tokens of the longest session, which the KV pool must hold.

    Raises:
        ValueError: No such side, or its split leaves too little for KV.
    """
    parsed = parse_side(name)
    if parsed.is_elora:
        pool = ("--max-total-tokens", str(sizes.pool_slots))
        return Side(
            name,
            ELORA_SERVER,
            (
                *("--elora", "--elora-policy", parsed.argument, *pool),
                *(*_host_tier(sizes, sizes.pool_slots), *parsed.setting_flags),
            ),
            variants=parsed.others,
            names_sessions=parsed.has("sessions"),
            threads=parsed.threads,
        )
    num_slots = int(parsed.argument or STOCK_DEFAULT_SLOTS)
    flags = _split(num_slots, sizes, longest)
    if parsed.system == TUNED or parsed.has("hicache"):
        policy = "write_back" if parsed.system == TUNED else "write_through"
        policy = next((o for o in parsed.options if o in WRITE_POLICIES), policy)
        flags += _host_tier(sizes, sizes.kv_tokens(num_slots), policy)
    fits = parsed.system == TUNED and 2 * num_slots >= num_adapters
    if fits or parsed.has("overlap"):
        # SGLang refuses more loaded adapters than twice the slots; the variant lifts that.
        flags += ("--enable-lora-overlap-loading", "--max-loaded-loras", str(num_adapters))
    return Side(
        name,
        _STOCK,
        (*flags, *parsed.setting_flags),
        stock_variants=tuple(o for o in parsed.options if o in STOCK_VARIANTS),
        threads=parsed.threads,
    )


def common_flags(checkpoint: Path, adapters: Mapping[str, Path]) -> list[str]:
    return [
        *("--model-path", str(checkpoint), "--served-model-name", "demo", "--dtype", "float32"),
        *("--max-running-requests", "32", "--enable-lora", "--enable-cache-report"),
        *("--lora-paths", *(f"{name}={path}" for name, path in adapters.items())),
    ]


def _split(num_slots: int, sizes: Sizes, longest: int) -> tuple[str, ...]:
    kv_tokens = sizes.kv_tokens(num_slots)
    if kv_tokens < longest:
        raise ValueError(
            f"{num_slots} adapter slots leave {max(0, kv_tokens)} of {sizes.pool_slots} tokens for "
            f"KV, and the longest session has {longest}: take fewer slots, or a larger "
            "--stock-kv-tokens"
        )
    slots = ("--max-loras-per-batch", str(num_slots))
    return (*slots, "--max-total-tokens", str(kv_tokens))


def _host_tier(
    sizes: Sizes, device_tokens: int, write_policy: str = "write_back"
) -> tuple[str, ...]:
    return (
        *("--enable-hierarchical-cache", "--hicache-io-backend", "direct"),
        *("--hicache-mem-layout", "layer_first", "--hicache-write-policy", write_policy),
        *("--hicache-ratio", f"{sizes.host_tokens / device_tokens:.4f}"),
    )
