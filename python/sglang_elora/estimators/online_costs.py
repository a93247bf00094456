"""Rates of prefill and of copies, measured while a server runs, for the policy and the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang_elora.estimators.batch_size import BatchSize
from sglang_elora.estimators.popularity import Popularity
from sglang_elora.estimators.rates import LinkCost, PrefillCost
from sglang_elora.policy import Costs

REFRESH_STEPS = 64
"""Scheduler iterations between two fits of a rate. Fewer follow changes faster; a fit takes
0.1 ms."""

Agree = Callable[..., tuple[float, ...]]
"""Maps values measured on this rank to values that are equal on all ranks."""


class OnlineCosts:
    """Measured costs of one scheduler. ``costs`` and ``needed_adapters`` are equal on all ranks.

    Args:
        agree: Makes all ranks use the same values.
    """

    def __init__(self, agree: Agree = lambda *values: values) -> None:
        self.costs = Costs()
        self.needed_adapters = 1.0  # adapters that a batch is expected to use
        self.popularity = Popularity()
        self._batch_size = BatchSize()
        self._prefill = PrefillCost(self.costs.recompute)
        self._link = LinkCost(self.costs.load, self.costs.load_latency)
        self._agree = agree
        self._num_steps = 0

    def batch(self, moment_s: float, num_requests: int) -> None:
        """Record a batch of ``num_requests`` requests that ran at ``moment_s``."""
        self._batch_size.add(moment_s, num_requests)

    def prefill(self, requests: Iterable[tuple[int, int]], seconds: float) -> None:
        """Record a prefill batch that waited for no copy, and its time.

        Args:
            requests: (new, cached) tokens of each request.
        """
        self._prefill.add(requests, seconds)

    def copied(self, num_slots: int, seconds: float) -> None:
        """Record the copy of an adapter from the host, and its time."""
        self._link.add(num_slots, seconds)

    def refresh(self) -> bool:
        """Fit one rate, if one is due. Call once per scheduler iteration, when there is time.

        Returns:
            Whether one was due.
        """
        self._num_steps += 1
        turn, rest = divmod(self._num_steps % REFRESH_STEPS, REFRESH_STEPS // 3)
        if rest or turn > 2:
            return False
        if turn == 0:
            self.costs.recompute, self.costs.batch = self._agree(*self._prefill.rates())
        elif turn == 1:
            self.costs.load, self.costs.load_latency = self._agree(*self._link.rates())
        else:
            needed = self.popularity.expected_distinct(self._batch_size.mean)
            (self.needed_adapters,) = self._agree(needed)
        return True
