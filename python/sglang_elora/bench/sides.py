"""The servers that are compared, each with the same bytes on the device and on the host.

``stock-default``: SGLang as it comes, with its 8 adapter slots. ``stock-tuned:N``: N slots, a host
tier for KV, and adapters loaded beside the batches where stock allows it; with ``+write_through``
KV is copied to that tier when it is made and not when it is evicted. ``elora:POLICY``: one pool,
the same host tier. ``elora:POLICY+VARIANT`` changes one thing of ELORA by a plugin (``variant``),
for example leaves out a term of the paper's policy. With
``elora:POLICY+sessions`` requests name their session, and the last of it closes it.

Stock's slots have room for the largest rank. What N of them leave of the bytes is its KV pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec
from sglang_elora.testbed.checkpoint import ModelShape
from sglang_elora.testbed.server import ELORA_SERVER, python_module
from sglang_elora.workloads import adapter_name

STOCK_DEFAULT_SLOTS = 8  # SGLang's --max-loras-per-batch
RANKS = (8, 16, 24, 32, 48, 64)
SHAPE = ModelShape(num_kv_heads=4)
"""1,000 tokens of prefill take about 150 ms on one core, six times what an empty step takes. With
four KV heads an adapter of rank 32 takes as many slots as a short chat has tokens (512), as one
of an 8B model does (1,280) beside chats that are as much longer."""

_FLOAT32 = 4
_STOCK = python_module("sglang.launch_server")


def adapter_specs(count: int) -> list[AdapterSpec]:
    """Ranks in turns, so that popular adapters have all of them. All linear layers."""
    return [
        AdapterSpec(adapter_name(i), rank, rank, ALL_LINEAR, seed=i)
        for i, rank in zip(range(count), RANKS * count, strict=False)
    ]


def adapter_bytes(rank: int, shape: ModelShape) -> int:
    """Weights of an adapter of all linear layers, which is also what a slot of stock's takes."""
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    a_rows = 3 * hidden + heads + 2 * hidden + mlp
    b_rows = heads + 2 * kv + hidden + 2 * mlp + hidden
    return shape.num_layers * rank * (a_rows + b_rows) * _FLOAT32


@dataclass(frozen=True, slots=True)
class Sizes:
    """Device bytes are those of stock's default; ``host_share`` is host KV over all of them."""

    stock_kv_tokens: int = 6_144  # beside STOCK_DEFAULT_SLOTS adapter slots
    host_share: float = 2.0
    num_layers: int = SHAPE.num_layers

    @property
    def shape(self) -> ModelShape:
        return replace(SHAPE, num_layers=self.num_layers)

    @property
    def adapter_slot_bytes(self) -> int:
        """Of stock's slots, which all have room for the largest rank."""
        return adapter_bytes(max(RANKS), self.shape)

    @property
    def slot_bytes(self) -> int:
        """KV of one token."""
        return 2 * self.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * _FLOAT32

    @property
    def total_bytes(self) -> int:
        kv_bytes = self.stock_kv_tokens * self.slot_bytes
        return STOCK_DEFAULT_SLOTS * self.adapter_slot_bytes + kv_bytes

    @property
    def pool_slots(self) -> int:
        """Of the one pool."""
        return self.total_bytes // self.slot_bytes

    @property
    def host_tokens(self) -> int:
        return round(self.host_share * self.pool_slots)

    def kv_tokens(self, num_slots: int) -> int:
        """What ``num_slots`` adapter slots leave for KV; not positive if nothing."""
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
    """A server to start: ``program`` with ``flags`` beside the common ones, and a plugin."""

    name: str
    program: Sequence[str]
    flags: tuple[str, ...]
    variant: str | None = None
    names_sessions: bool = False


def make_side(name: str, sizes: Sizes, num_adapters: int, longest: int) -> Side:
    """The side of that name.

    Args:
        longest: Tokens of the longest session, which the KV pool must hold.

    Raises:
        ValueError: No such side, or its split leaves too little for KV.
    """
    kind, _, argument = name.partition(":")
    if kind == "elora" and argument:
        argument, sessions, _ = argument.partition("+sessions")
        argument, _, variant = argument.partition("+")
        flags: tuple[str, ...] = ("--elora", "--elora-policy", argument)
        flags += ("--max-total-tokens", str(sizes.pool_slots))
        flags += _host_tier(sizes, sizes.pool_slots)
        return Side(name, ELORA_SERVER, flags, variant or None, names_sessions=bool(sessions))
    if name == "stock-default":
        return Side(name, _STOCK, _split(STOCK_DEFAULT_SLOTS, sizes, longest))
    slots, _, write_policy = argument.partition("+")
    if kind == "stock-tuned" and slots.isdigit():
        num_slots = int(slots)
        split = _split(num_slots, sizes, longest)
        host = _host_tier(sizes, sizes.kv_tokens(num_slots), write_policy or "write_back")
        # Stock pins what it loads beside the batches, and asks for a slot per two of those.
        overlap = ("--enable-lora-overlap-loading", "--max-loaded-loras", str(num_adapters))
        return Side(
            name, _STOCK, (*split, *host, *(overlap if 2 * num_slots >= num_adapters else ()))
        )
    raise ValueError(f"side {name!r} must be stock-default, stock-tuned:SLOTS or elora:POLICY")


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
