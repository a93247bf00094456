"""Adapters named by hints or orders, for which requests are expected.

A hint is a guess, an order is a command. Hints are followed while hinted adapters get used, and
unused ones take at most a small share of the pool. So a client that sends hints without limit costs
the others little.
"""

from __future__ import annotations

MAX_PENDING = 32
"""Most adapters pending by hints, and most by orders. More lengthen each scheduler step."""

HINT_STEPS = 64
"""Iterations with a batch for which a hint stays valid. More keep unused adapters longer."""

ORDER_STEPS = 512
"""As ``HINT_STEPS``, for an order."""

HINTED_SHARE = 0.125
"""Share of the pool for adapters that only hints named; one of them always has room. More leaves
less to queued requests."""

MOST_CREDIT = 16
"""Most adapters loaded for hints alone that are not used yet. More tolerates more wrong hints."""

CREDIT_STEPS = 128
"""Iterations with a batch after which one more may be loaded, even if none was used."""

_MOST_REMEMBERED = 256
"""Most unused hinted adapters that are remembered."""


class PendingHints:
    """The pending hints and orders of one planner. Each call is O(1), except ``due``, which is
    O(``MAX_PENDING``).

    Args:
        pool_slots: Slots of the KV pool.
    """

    def __init__(self, pool_slots: int) -> None:
        self._room = HINTED_SHARE * pool_slots
        self._num_steps = 0
        # Adapter -> last step at which it is expected, in the order of these steps.
        self._hinted: dict[str, int] = {}
        self._ordered: dict[str, int] = {}
        self._credit = MOST_CREDIT
        self._unused: dict[str, None] = {}  # loaded for hints and not used, most recent last

    def __bool__(self) -> bool:
        return bool(self._hinted or self._ordered)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._hinted or adapter_id in self._ordered

    def step(self) -> None:
        """Begin an iteration with a batch."""
        self._num_steps += 1
        if self._num_steps % CREDIT_STEPS == 0:
            self._credit = min(self._credit + 1, MOST_CREDIT)

    def add(self, adapter_id: str, *, ordered: bool) -> bool:
        """Add an adapter, or renew it. Returns False if too many are pending."""
        which, steps = (self._ordered, ORDER_STEPS) if ordered else (self._hinted, HINT_STEPS)
        if adapter_id not in which and len(which) >= MAX_PENDING:
            return False
        which.pop(adapter_id, None)
        which[adapter_id] = self._num_steps + steps
        return True

    def forget(self, adapter_id: str) -> bool:
        """Remove an adapter. Returns whether it was expected."""
        was_ordered = self._ordered.pop(adapter_id, None) is not None
        return self._hinted.pop(adapter_id, None) is not None or was_ordered

    def used(self, adapter_id: str) -> bool:
        """Record that a request with the adapter runs. Returns whether it was expected."""
        if adapter_id in self._unused:
            del self._unused[adapter_id]
            self._credit = min(self._credit + 1, MOST_CREDIT)
        return self.forget(adapter_id)

    def came(self, adapter_id: str) -> None:
        """Record that an expected adapter got slots although no queued request needs it."""
        if adapter_id not in self._ordered:
            self._credit -= 1
            self._unused[adapter_id] = None
            if len(self._unused) > _MOST_REMEMBERED:  # the oldest are most likely evicted
                del self._unused[next(iter(self._unused))]

    def due(self) -> list[str]:
        """Expected adapters, those of orders first; expired ones are removed."""
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
        """Whether an expected adapter is to be loaded to the device, or kept there.

        Args:
            num_slots: Slots of the adapter.
            hinted_slots: Slots of the followed adapters that only hints named.
            is_there: Whether the adapter is on the device.
        """
        if adapter_id in self._ordered:
            return True
        has_room = not hinted_slots or hinted_slots + num_slots <= self._room
        return has_room and (adapter_id in self._unused if is_there else self._credit > 0)

    def is_hint(self, adapter_id: str) -> bool:
        """Whether no order named the adapter, only a hint."""
        return adapter_id not in self._ordered
