"""Adapters that requests are expected for: hints and orders have named them.

A hint is a guess, an order is not. Hints are followed as long as they come true, whoever sends
them, and what they brought in holds a small part of the pool until it is used; so that a client who
names adapters without end costs the others next to nothing.
"""

from __future__ import annotations

MAX_PENDING = 32
"""Adapters that hints name, and as many that orders do."""

HINT_STEPS = 64
"""Iterations with a batch for which a hint holds."""

ORDER_STEPS = 512
"""As above, for an order."""

HINTED_SHARE = 0.125
"""Of the pool, for adapters that came for hints alone; one of them always has its place."""

MOST_CREDIT = 16
"""Adapters that came for hints alone and have not been used yet, most of them."""

CREDIT_STEPS = 128
"""Iterations with a batch, after which one more may come, whatever became of them."""

_MOST_REMEMBERED = 256


class PendingHints:
    """One per swapper. Each call is O(1), ``due`` apart, which is O(``MAX_PENDING``).

    Args:
        pool_slots: Of the KV pool.
    """

    def __init__(self, pool_slots: int) -> None:
        self._room = HINTED_SHARE * pool_slots
        self._num_steps = 0
        # Adapter -> step up to which it is expected, the soonest over first.
        self._hinted: dict[str, int] = {}
        self._ordered: dict[str, int] = {}
        self._credit = MOST_CREDIT
        self._unused: dict[str, None] = {}  # came for hints, the last ones

    def __bool__(self) -> bool:
        return bool(self._hinted or self._ordered)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._hinted or adapter_id in self._ordered

    def step(self) -> None:
        """An iteration with a batch begins."""
        self._num_steps += 1
        if self._num_steps % CREDIT_STEPS == 0:
            self._credit = min(self._credit + 1, MOST_CREDIT)

    def add(self, adapter_id: str, *, ordered: bool) -> bool:
        """False if there are too many already."""
        which, steps = (self._ordered, ORDER_STEPS) if ordered else (self._hinted, HINT_STEPS)
        if adapter_id not in which and len(which) >= MAX_PENDING:
            return False
        which.pop(adapter_id, None)
        which[adapter_id] = self._num_steps + steps
        return True

    def forget(self, adapter_id: str) -> bool:
        """Whether it was expected."""
        was_ordered = self._ordered.pop(adapter_id, None) is not None
        return self._hinted.pop(adapter_id, None) is not None or was_ordered

    def used(self, adapter_id: str) -> bool:
        """A request with it runs. Whether it was expected."""
        if adapter_id in self._unused:
            del self._unused[adapter_id]
            self._credit = min(self._credit + 1, MOST_CREDIT)
        return self.forget(adapter_id)

    def came(self, adapter_id: str) -> None:
        """It has its slots now, and no request waited for it."""
        if adapter_id not in self._ordered:
            self._credit -= 1
            self._unused[adapter_id] = None
            if len(self._unused) > _MOST_REMEMBERED:  # most of them have gone long ago
                del self._unused[next(iter(self._unused))]

    def due(self) -> list[str]:
        """Those of orders first."""
        for which in (self._ordered, self._hinted):
            while which and next(iter(which.values())) < self._num_steps:
                del which[next(iter(which))]
        return [
            *self._ordered,
            *(adapter_id for adapter_id in self._hinted if adapter_id not in self._ordered),
        ]

    def is_followed(
        self, adapter_id: str, num_slots: int, hinted_slots: int, *, is_there: bool
    ) -> bool:
        """Whether it is to be brought to the device, or to be kept there.

        Args:
            num_slots: That it takes.
            hinted_slots: That adapters take which only hints named, and which are followed.
        """
        if adapter_id in self._ordered:
            return True
        has_room = not hinted_slots or hinted_slots + num_slots <= self._room
        return has_room and (adapter_id in self._unused if is_there else self._credit > 0)

    def is_hint(self, adapter_id: str) -> bool:
        """Whether nothing but a hint named it."""
        return adapter_id not in self._ordered
