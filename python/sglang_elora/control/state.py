"""What the scheduler tells of itself: rows per adapter, totals, and what changed since when.

Values only, as they travel between processes. ``*_s`` are seconds of the machine's monotonic clock,
which its processes share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_elora.control.histogram import Histogram

Tier = Literal["disk", "reading", "host", "loading", "device"]
"""Where an adapter's weights are: in its file, on their way to host memory, there, on their way to
the device, there."""


class AdapterState(msgspec.Struct, frozen=True, array_like=True):
    """One adapter. New fields go to the end."""

    id: str
    tier: Tier
    pinned: bool
    slots: int  # of the KV pool, while it is on the device
    host_bytes: int  # of its image in host memory
    kv_tokens_device: int
    kv_tokens_host: int
    visits: int  # requests that ran with it
    last_used_s: float | None


class PoolState(msgspec.Struct, frozen=True, array_like=True):
    """Totals, in slots of the pool (one holds one token's KV) where nothing else is said."""

    slots: int
    free: int
    adapters: int
    kv: int  # cached, of adapters and of the base model
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
    most_in_batch: int  # adapters
    load_s: Histogram  # how long copies to the device took
    num_sessions: int  # that are not over

    @property
    def uses(self) -> dict[str, int]:
        """Slots by what they hold. KV that nobody has put into the tree yet is ``running``."""
        return {
            "free": self.free,
            "adapters": self.adapters,
            "kv_of_adapters": self.kv - self.kv_base,
            "kv_of_base": self.kv_base,
            "running": max(0, self.slots - self.free - self.adapters - self.kv),
        }


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """Adapters that changed after the version that was asked for, up to ``version``.

    With ``more`` there are others, to be asked for with this version.
    """

    version: int
    more: bool
    adapters: list[AdapterState]
    pool: PoolState
