"""The state that a scheduler reports: a row per adapter, totals, and changes since a version.

Plain values that are sent between processes. ``*_s`` are seconds of the machine's monotonic clock,
which all its processes share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_elora.control.histogram import Histogram

Tier = Literal["disk", "reading", "host", "loading", "device"]
"""Location of an adapter's weights: only in its file, being read into host memory, in host memory,
being copied to the device, on the device."""


class AdapterState(msgspec.Struct, frozen=True, array_like=True):
    """State of one adapter. New fields must be appended."""

    id: str
    tier: Tier
    pinned: bool
    slots: int  # that its weights take in the KV pool; 0 unless on the device
    host_bytes: int  # size of its image in host memory
    kv_tokens_device: int
    kv_tokens_host: int
    visits: int  # requests that ran with it
    last_used_s: float | None
    num_dropped_weights: int = 0  # in its files, and not served (--elora-tower-weights drop)
    is_activated: bool = False  # acts from its invocation tokens on (``tree.activation``)
    shared_tokens: int = 0  # of its prompts, found as KV of the base model
    computed_tokens: int = 0  # of its prompts, not found in the cache
    generated_tokens: int = 0  # of answers that have ended


class PoolState(msgspec.Struct, frozen=True, array_like=True):
    """Totals of one scheduler, in slots of the pool (one token's KV each) unless noted."""

    slots: int
    free: int
    adapters: int
    kv: int  # cached KV of adapters and of the base model
    kv_base: int
    kv_host: int
    num_adapters: int
    num_on_device: int
    num_on_host: int
    adapter_host_bytes: int
    num_waiting: int
    num_running: int
    counts: dict[str, int]
    waiting: list[str]  # adapters of the first requests in the queue
    running: list[str]  # adapters of the running batch
    most_in_batch: int  # largest number of adapters in one batch
    load_s: Histogram  # durations of copies to the device
    num_sessions: int  # open ones

    @property
    def uses(self) -> dict[str, int]:
        """Slots by content. KV of running requests that is not in the tree yet is ``running``."""
        return {
            "free": self.free,
            "adapters": self.adapters,
            "kv_of_adapters": self.kv - self.kv_base,
            "kv_of_base": self.kv_base,
            "running": max(0, self.slots - self.free - self.adapters - self.kv),
        }


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """Adapters that changed after the requested version, up to ``version``.

    If ``more`` is set, there are further changes: request them with this version.
    """

    version: int
    more: bool
    adapters: list[AdapterState]
    pool: PoolState
