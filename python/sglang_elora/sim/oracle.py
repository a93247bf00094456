"""The default policy with part of the trace's future: says which tier lacks how much to the oracle.

``Clairvoyant`` knows the future of everything. These know it of one part, and rank the rest as
``elora`` does.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from typing_extensions import override

from sglang_elora.policy import CacheEntry, PolicyContext, register
from sglang_elora.policy.elora import Elora
from sglang_elora.sim.clairvoyant import SOON_S


class Part(StrEnum):
    """What an ``Oracle`` knows the future of."""

    ADAPTERS = "adapters"  # on the device
    DEVICE = "device"  # adapters and KV there
    HOST = "host"  # which copies to keep, and which to make


@register
class Oracle(Elora):
    """``elora`` that knows the next uses of one part. The mean rate of turnovers so far converts
    seconds to turnovers, in which ``elora`` counts."""

    name = "oracle"

    def __init__(self, *args: Any, part: Part, **options: Any) -> None:
        super().__init__(*args, **options)
        self.now_s = 0.0
        self._part = part
        self._next_s: dict[CacheEntry, float] = {}

    @classmethod
    @override
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        return cls(context.costs, context.is_held, context.writes_back, **options)

    def foresee(self, item: CacheEntry, next_s: float) -> None:
        self._next_s[item] = next_s

    @override
    def remove(self, item: CacheEntry) -> None:
        super().remove(item)
        self._next_s.pop(item, None)

    @override
    def kind(self, item: CacheEntry) -> Any:
        return (item.is_adapter, item.backed) if self._part is Part.DEVICE else super().kind(item)

    @override
    def priority(self, item: CacheEntry) -> float:
        return -self._next_of(item) if self._part is Part.DEVICE else super().priority(item)

    @override
    def rank(self, kind: Any, priority: float) -> float:
        if self._part is not Part.DEVICE:
            return super().rank(kind, priority)
        is_adapter, is_backed = kind
        costs = self.costs
        copied = costs.load if is_backed else 2 * costs.load
        saved = costs.load if is_adapter else min(costs.recompute, copied)
        return saved * self._density(-priority)

    @override
    def place(self, item: CacheEntry) -> None:
        if self._part is not Part.DEVICE:  # which values no groups
            super().place(item)

    @override
    def displace(self, item: CacheEntry) -> None:
        if self._part is not Part.DEVICE:
            super().displace(item)

    @override
    def check_invariants(self, on_device: Any) -> None:
        if self._part is not Part.DEVICE:
            super().check_invariants(on_device)

    @override
    def host_kind(self, item: CacheEntry) -> Any:
        return None if self._part is Part.HOST else super().host_kind(item)

    @override
    def host_priority(self, item: CacheEntry) -> float:
        return -self._next_of(item) if self._part is Part.HOST else item.last

    @override
    def host_rank(self, kind: Any, priority: float) -> float:
        if self._part is Part.HOST:
            return self._density(-priority)
        return super().host_rank(kind, priority)

    @override
    def worth_host_copy(self, item: CacheEntry) -> bool:
        if self._part is Part.HOST:
            return self._next_of(item) < float("inf")
        return super().worth_host_copy(item)

    @override
    def _value_of_adapter(self, adapter: CacheEntry) -> float:
        if self._part is Part.ADAPTERS:
            return self.costs.load * self._density(self._next_of(adapter))
        return super()._value_of_adapter(adapter)

    def _next_of(self, item: CacheEntry) -> float:
        return self._next_s.get(item, float("inf"))

    def _density(self, next_s: float) -> float:
        """Hits per turnover until the next use."""
        turnover_s = self.now_s / max(self.clock, 1e-9)
        return turnover_s / max(next_s - self.now_s, SOON_S)
