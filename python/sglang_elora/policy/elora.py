"""ELORA's default: seconds saved per slot and turnover, by what is learned and what is measured.

``value = hit density * seconds saved by a hit, per slot``. Hit density (``reuse_table.py``) is
learned for adapters and for KV by itself, and apart for what living sessions use and for what only
a session used that is over (where requests name sessions). What a return saves is the time to bring
an adapter, or KV with a copy on the host, over the link, or to compute other KV anew, at measured
rates. KV that leaves the device takes room on the host, where adapters are in any case; while that
is full, other KV leaves it for good, and what that was worth is saved too by KV that stays.

An adapter cannot leave before its KV. So a little KV that is worth much can keep an adapter that is
worth little and takes much space: what has to be compared with others is then not the leaf but the
whole, its values over its slots, as in a knapsack with precedences. A leaf counts what it is worth
itself or what the whole is worth, whichever is less; where the whole is least, its leaves go one
after the other until the adapter is free. An adapter that is in use stays anyhow, and its leaves
count for themselves.

Against the paper's model: value is per byte, so that a large item has to earn its place; rates are
measured, not configured; how fast worth fades with time is learned, not chosen; and the order of
two items of a kind changes only when one is visited, so that nothing is rescanned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from typing_extensions import override

from sglang_elora.policy.cache_entry import NEVER, CacheEntry, SessionState
from sglang_elora.policy.policy import Costs, Policy, PolicyContext
from sglang_elora.policy.registry import register
from sglang_elora.policy.reuse_table import ReuseTable

ADAPTER, KV, KV_ON_HOST = range(3)
Kind = tuple[str | None, int, int]
"""(the adapter, one of the above, an ``SessionState``)"""

_COPY_OUT = 0.5
"""Of a load: it takes the link's other direction, most often beside a batch."""
_PRICE_WEIGHT = 0.02  # of one copy, in the price of a host slot

_ERAS_PER_TURNOVER = 8
NO_ERA = -1


@dataclass(slots=True)
class _Group:
    """An adapter on the device and its KV there, by the era of its last visit."""

    adapter: CacheEntry | None = None
    slots: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """Of KV, by (era, family, session_state)."""
    num_slots: int = 0  # their sum
    value: float = 0.0  # of all KV together, summed up in ``valued_in`` and kept up since
    valued_in: int = -1


@register
class Elora(Policy):
    """
    Args:
        is_held: Whether an adapter cannot leave now, because a request uses it or waits for it.
        writes_back: Whether KV that leaves the device is copied to the host if that is worth it.
    """

    name = "elora"

    def __init__(
        self,
        costs: Costs,
        is_held: Callable[[str], bool] = lambda group: False,
        writes_back: bool = False,
    ) -> None:
        super().__init__(costs)
        self._writes_back = writes_back
        self._adapters, self._kv = ([ReuseTable() for _ in SessionState] for _ in range(2))
        self._is_held = is_held
        self._host_price = 0.0  # hit density of what is dropped there for a new copy
        self._groups: dict[str, _Group] = {}

    @classmethod
    @override
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        return cls(context.costs, context.is_held, context.writes_back, **options)

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            if item.last != NEVER:
                self._reuse_of(item).end(self.clock - item.last, returned=True)
            item.visits += 1
            item.last = self.clock
            if item.counted is not None:
                self.displace(item)
                self.place(item)

    def set_session_state(self, item: CacheEntry, session_state: SessionState) -> None:
        """How it ends is learned of what it is then. To count it as an end of what it was would
        fill the life tables with items that were that for a moment only."""
        was_counted = item.counted is not None
        self.displace(item)
        item.session_state = session_state
        if was_counted:
            self.place(item)

    def remove(self, item: CacheEntry) -> None:
        if item.last != NEVER:
            self._reuse_of(item).end(self.clock - item.last, returned=False)

    def place(self, item: CacheEntry) -> None:
        if item.group is None:
            return
        group = self._groups.setdefault(item.group, _Group())
        item.counted = (self._era, *self.kind(item)[1:])
        if item.is_adapter:
            group.adapter = item
        else:
            self._count(group, item.counted, item.num_slots)

    def displace(self, item: CacheEntry) -> None:
        if item.group is None or item.counted is None:
            return
        group = self._groups[item.group]
        if item.is_adapter:
            group.adapter = None
        else:
            self._count(group, item.counted, -item.num_slots)
        item.counted = None
        if group.adapter is None and not group.slots:
            del self._groups[item.group]

    def kind(self, item: CacheEntry) -> Kind:
        family = ADAPTER if item.is_adapter else KV_ON_HOST if item.backed else KV
        return item.group, family, item.session_state

    def priority(self, item: CacheEntry) -> float:
        return item.last

    def rank(self, kind: Kind, priority: float) -> float:
        group, family, session_state = kind
        own = self._value(family, session_state, priority)
        if group is None:
            return own
        whole = self._value_of_whole(group)
        return own if own <= whole or self._is_held(group) else whole

    def learn(self) -> bool:
        return any(table.learn() for table in (*self._adapters, *self._kv))

    def host_kind(self, item: CacheEntry) -> tuple[int, int]:
        """By age: on the host it is not always the oldest that goes, so that long pauses between
        turns are kept through, even where there is no room for all."""
        era = NO_ERA if item.last == NEVER else int(item.last * _ERAS_PER_TURNOVER)
        return era, item.session_state

    def host_rank(self, kind: tuple[int, int], priority: float) -> float:
        """A copy on the host saves what computing costs more than loading; all slots alike."""
        era, session_state = kind
        return (
            0.0 if era == NO_ERA else self._kv[session_state].hit_density_at(self.clock - priority)
        )

    def worth_host_copy(self, item: CacheEntry) -> bool:
        """Copying it there takes the link as long as one load; a later visit saves the rest."""
        load = self.costs.load_of(item)
        chance = self._kv[item.session_state].chance(self.clock - item.last)
        return chance * (self.costs.recompute - load) > load

    def price_host(self, rank: float | None) -> None:
        self._host_price += _PRICE_WEIGHT * ((rank or 0.0) - self._host_price)

    def check_invariants(self, on_device: Iterable[CacheEntry]) -> None:
        """Raises:
        AssertionError: The slots counted per adapter are not those of the items on the device.
        """
        slots: dict[str, int] = {}
        adapters: dict[str, CacheEntry] = {}
        for item in on_device:
            if item.group is not None and item.is_adapter:
                adapters[item.group] = item
            elif item.group is not None:
                slots[item.group] = slots.get(item.group, 0) + item.num_slots
        counted = {
            adapter_id: sum(g.slots.values()) for adapter_id, g in self._groups.items() if g.slots
        }
        assert counted == slots, (counted, slots)
        sums = {adapter_id: g.num_slots for adapter_id, g in self._groups.items() if g.num_slots}
        assert sums == slots, (sums, slots)
        held = {
            adapter_id: g.adapter for adapter_id, g in self._groups.items() if g.adapter is not None
        }
        assert held == adapters, (held, adapters)

    def _value(self, family: int, session_state: int, last: float) -> float:
        """Seconds saved, per slot and turnover."""
        if last == NEVER:
            return 0.0
        costs, age = self.costs, self.clock - last
        if family == ADAPTER:
            return self._adapters[session_state].hit_density(age) * costs.load
        density = self._kv[session_state].hit_density(age)
        dropped = density * costs.recompute
        if family == KV and not self._writes_back:
            return dropped
        copied = density * costs.load * (1.0 if family == KV_ON_HOST else 1.0 + _COPY_OUT)
        return min(dropped, copied + self._host_price * max(costs.recompute - costs.load, 0.0))

    def _value_of_whole(self, adapter_id: str) -> float:
        """Per slot, of an adapter and its KV on the device. O(eras) once per era, else O(1)."""
        group = self._groups[adapter_id]
        if group.valued_in != self._era:
            group.valued_in = self._era
            group.value = sum(n * self._value_in(*counted) for counted, n in group.slots.items())
        total, num_slots = max(group.value, 0.0), group.num_slots
        if group.adapter is not None:
            adapter = group.adapter
            total += adapter.num_slots * self._value(ADAPTER, adapter.session_state, adapter.last)
            num_slots += adapter.num_slots
        return total / num_slots

    def _value_in(self, era: int, family: int, session_state: int) -> float:
        """Per slot, of KV that was last used in this era."""
        middle = (era + 0.5) / _ERAS_PER_TURNOVER
        return self._value(family, session_state, min(middle, self.clock))

    def _count(self, group: _Group, counted: tuple[int, int, int], num_slots: int) -> None:
        left = group.slots.get(counted, 0) + num_slots
        if left:
            group.slots[counted] = left
        else:
            del group.slots[counted]
        group.num_slots += num_slots
        group.value += num_slots * self._value_in(*counted)

    @property
    def _era(self) -> int:
        return int(self.clock * _ERAS_PER_TURNOVER)

    def _reuse_of(self, item: CacheEntry) -> ReuseTable:
        return (self._adapters if item.is_adapter else self._kv)[item.session_state]
