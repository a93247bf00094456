"""What the simulated server has measured, for its policy, as ``srt/measure.py`` does."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_elora.estimators import BatchSize, LinkCost, Popularity, PrefillCost
from sglang_elora.policy import Costs

TAKE_OVER_EVERY = 64


class Measure:
    def __init__(self) -> None:
        self.costs = Costs()
        self.needed_adapters = 1.0
        self.popularity = Popularity()
        self._batch_size = BatchSize()
        self._prefill = PrefillCost(self.costs.recompute)
        self._link = LinkCost(self.costs.load, self.costs.load_latency)
        self._num_steps = 0

    def batch(self, moment_s: float, num_requests: int) -> None:
        self._batch_size.add(moment_s, num_requests)

    def prefill(self, requests: Sequence[tuple[int, int]], seconds: float) -> None:
        """(new, cached) tokens of each request, of a batch that waited for no copy."""
        self._prefill.add(requests, seconds)

    def copied(self, num_slots: int, seconds: float) -> None:
        self._link.add(num_slots, seconds)

    def take_over(self) -> bool:
        """One figure at a time; whether there was one."""
        self._num_steps += 1
        turn, rest = divmod(self._num_steps % TAKE_OVER_EVERY, TAKE_OVER_EVERY // 3)
        if rest or turn > 2:
            return False
        if turn == 0:
            self.costs.recompute, self.costs.batch = self._prefill.rates()
        elif turn == 1:
            self.costs.load, self.costs.load_latency = self._link.rates()
        else:
            self.needed_adapters = self.popularity.expected_distinct(self._batch_size.mean)
        return True
