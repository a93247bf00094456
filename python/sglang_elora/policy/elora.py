"""The default policy: rank = seconds that keeping an entry saves, per slot and turnover.

``value = hit density * seconds saved by a hit, per slot``. Hit density (``reuse_table.py``) is
learned separately for adapters and for KV, and for each ``SessionState``. A hit saves the load from
the host (adapters, and KV with a host copy) or the recompute (other KV), at measured rates. Evicted
KV is copied to the host, where adapters have a copy in any case. While the host tier is full, each
such copy drops another one; KV that stays on the device saves the value of that copy, too.
Host copies, and only they, are ranked by the turns of their conversation (``tree/turns.py``): a
life table for each number of turns tells which conversations are over. KV of activated LoRAs,
which lies beside a conversation that goes on without it, has a life table of its own. An adapter's
value is the geometric mean of that by hit density and that by its own rate of visits.

An adapter cannot be evicted before its KV. A few KV slots of high value could therefore keep a
large adapter of low value. To prevent that, an adapter and its KV are also valued together (total
value over total slots, as in a knapsack with precedence constraints), and the rank of a leaf is the
lower of its own value and that of its group. When the group is the lowest, its leaves are evicted
one after the other until the adapter itself can be evicted. If a request holds the adapter, it
cannot be evicted, and leaves keep their own value.

Differences from the paper's model: value is per slot, so size counts; rates are measured, not
configured; how value falls with age is learned, not configured; and two entries of one kind change
their order only when one is visited, so nothing is rescanned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from typing_extensions import override

from sglang_elora.policy.cache_entry import NEVER, CacheEntry, SessionState
from sglang_elora.policy.policy import Costs, Policy, PolicyContext
from sglang_elora.policy.registry import register
from sglang_elora.policy.reuse_table import ReuseTable

ADAPTER, KV, KV_ON_HOST = range(3)
ACTIVATED = len(SessionState)
"""Class of KV of activated LoRAs that no named session uses, beside those of ``SessionState``."""
Kind = tuple[str | None, int, int]
"""(adapter id, one of the above, ``SessionState`` or ``ACTIVATED``)"""

_COPY_OUT = 0.5
"""Cost of a copy to the host, as a share of the cost of a load. It is below 1 because the copy uses
the other direction of the link, mostly while a batch runs."""
_PRICE_WEIGHT = 0.02
"""Weight of one copy in the moving average of the host price; higher follows changes faster."""

_RATE_TURNOVERS = 3.0
"""Pool turnovers over which an adapter's rate of visits is averaged. Raising it follows changes of
popularity more slowly."""

_ERAS_PER_TURNOVER = 8
"""Age classes per pool turnover. More of them value groups more exactly, at more work per era."""
_HOST_ERAS_PER_TURNOVER = 4
"""As ``_ERAS_PER_TURNOVER``, for host copies, which have more classes and longer lives."""
MOST_TURNS = 8
"""Turns that have a life table of their own; conversations with more share the last one."""
NO_ERA = -1
"""Era of entries that were never visited."""


@dataclass(slots=True)
class _Group:
    """An adapter on the device, and its KV slots there by era of their last visit."""

    adapter: CacheEntry | None = None
    slots: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """KV slots by (era, family, session_state)."""
    num_slots: int = 0  # sum of ``slots``
    value: float = 0.0  # total of the KV: computed in era ``valued_in``, then updated
    valued_in: int = -1


@register
class Elora(Policy):
    """The default policy: lowest seconds saved per slot and turnover first (module docstring).

    Args:
        is_held: Whether an adapter cannot be evicted now: a running or queued request needs it.
        writes_back: Whether evicted KV is copied to the host if that is worth the transfer.
    """

    name = "elora"
    ghost_turnovers = 4.0

    def __init__(
        self,
        costs: Costs,
        is_held: Callable[[str], bool] = lambda group: False,
        writes_back: bool = False,
    ) -> None:
        super().__init__(costs)
        self._writes_back = writes_back
        self._adapters = [ReuseTable() for _ in SessionState]
        self._kv = [ReuseTable() for _ in range(ACTIVATED + 1)]
        self._by_turns = [ReuseTable() for _ in range(MOST_TURNS + 1)]
        self._is_held = is_held
        self._host_price = 0.0  # mean hit density of the host copies dropped for new ones
        self._groups: dict[str, _Group] = {}

    @classmethod
    @override
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        return cls(context.costs, context.is_held, context.writes_back, **options)

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            self._observe(item, returned=True)
            if item.is_adapter:
                item.score = 1.0 + self._recent_visits(item)
            item.visits += 1
            item.last = self.clock
            if item.counted is not None:
                self.displace(item)
                self.place(item)

    def set_session_state(self, item: CacheEntry, session_state: SessionState) -> None:
        """Set the session state. The outcome is credited to the entry's new state only: to also
        count an end for the old one would fill its life table with short-lived entries."""
        was_counted = item.counted is not None
        self.displace(item)
        item.session_state = session_state
        if was_counted:
            self.place(item)

    def remove(self, item: CacheEntry) -> None:
        self._observe(item, returned=False)

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
        return item.group, family, _class_of(item)

    def priority(self, item: CacheEntry) -> float:
        return item.last

    def rank(self, kind: Kind, priority: float) -> float:
        group, family, session_state = kind
        if group is None:
            return self._value(family, session_state, priority)
        if family == ADAPTER and (adapter := self._groups[group].adapter) is not None:
            own = self._value_of_adapter(adapter)
        else:
            own = self._value(family, session_state, priority)
        whole = self._value_of_whole(group)
        return own if own <= whole or self._is_held(group) else whole

    def learn(self) -> bool:
        return any(table.learn() for table in (*self._adapters, *self._kv, *self._by_turns))

    def host_kind(self, item: CacheEntry) -> tuple[int, int]:
        """Age class and life table of a host copy.

        On the host the oldest copy is not always the victim, so that KV can outlast long pauses
        between turns even if the host tier cannot hold that of all sessions.
        """
        era = NO_ERA if item.last == NEVER else int(item.last * _HOST_ERAS_PER_TURNOVER)
        return era, _host_class(item)

    def host_rank(self, kind: tuple[int, int], priority: float) -> float:
        """Hit density of a host copy. A hit saves the same (recompute - load) for every slot, so
        that factor is left out."""
        era, host_class = kind
        if era == NO_ERA:
            return 0.0
        return self._host_table(host_class).hit_density_at(self.clock - priority)

    def worth_host_copy(self, item: CacheEntry) -> bool:
        """Whether the expected saving (recompute - load, times the chance of a hit) exceeds the
        cost of the copy, taken as that of one load."""
        load = self.costs.load_of(item)
        chance = self._host_table(_host_class(item)).chance(self.clock - item.last)
        return chance * (self.costs.recompute - load) > load

    def price_host(self, rank: float | None) -> None:
        self._host_price += _PRICE_WEIGHT * ((rank or 0.0) - self._host_price)

    def check_invariants(self, on_device: Iterable[CacheEntry]) -> None:
        """Raises:
        AssertionError: The slots counted per adapter are not those of the entries on the device.
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
        """Seconds that keeping an entry saves, per slot and turnover."""
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

    def _value_of_adapter(self, adapter: CacheEntry) -> float:
        """As ``_value``, with the geometric mean of hit density and the adapter's own rate of
        visits: the one depends on its last visit only, the other on all recent ones."""
        by_age = self._value(ADAPTER, adapter.session_state, adapter.last)
        if not by_age:
            return 0.0
        by_rate = self._recent_visits(adapter) / _RATE_TURNOVERS * self.costs.load
        return math.sqrt(by_age * by_rate)

    def _recent_visits(self, adapter: CacheEntry) -> float:
        """Visits of an adapter, each of which counts less with its age."""
        if adapter.last == NEVER:
            return 0.0
        return adapter.score * math.exp((adapter.last - self.clock) / _RATE_TURNOVERS)

    def _value_of_whole(self, adapter_id: str) -> float:
        """Mean value per slot of an adapter with its KV on the device. O(eras) once per era,
        otherwise O(1)."""
        group = self._groups[adapter_id]
        if group.valued_in != self._era:
            group.valued_in = self._era
            group.value = sum(n * self._value_in(*counted) for counted, n in group.slots.items())
        total, num_slots = max(group.value, 0.0), group.num_slots
        if group.adapter is not None:
            adapter = group.adapter
            total += adapter.num_slots * self._value_of_adapter(adapter)
            num_slots += adapter.num_slots
        return total / num_slots

    def _value_in(self, era: int, family: int, session_state: int) -> float:
        """Value per slot of KV whose last visit was in this era."""
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

    def _observe(self, item: CacheEntry, *, returned: bool) -> None:
        """Record a hit or a removal in the life tables of the entry."""
        if item.last == NEVER:
            return
        age = self.clock - item.last
        self._reuse_of(item).end(age, returned=returned)
        if not item.is_adapter and _class_of(item) == SessionState.UNKNOWN:
            self._host_table(_host_class(item)).end(age, returned=returned)

    def _host_table(self, host_class: int) -> ReuseTable:
        return self._by_turns[host_class] if host_class >= 0 else self._kv[-host_class]

    def _reuse_of(self, item: CacheEntry) -> ReuseTable:
        return (self._adapters if item.is_adapter else self._kv)[_class_of(item)]


def _class_of(item: CacheEntry) -> int:
    if item.is_activated and item.session_state == SessionState.UNKNOWN:
        return ACTIVATED
    return item.session_state


def _host_class(item: CacheEntry) -> int:
    """Life table of KV on the host: minus its class, or the number of turns of the conversation
    that used it last."""
    if (its_class := _class_of(item)) != SessionState.UNKNOWN:
        return -its_class
    return min(item.turns_of_user, MOST_TURNS)
