"""What the running server takes for prefill and copies, for the policies and the swapper.

Clocks differ between tensor-parallel ranks, and decisions must not: ranks take over what rank 0 has
measured, every ``SYNC_STEPS`` iterations of the scheduler, which all ranks count alike.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from sglang_elora.estimators import BatchSize, LinkCost, Popularity, PrefillCost
from sglang_elora.policy import Costs

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

SYNC_STEPS = 64


class Measure:
    """One per scheduler process. ``costs`` and ``needed_adapters`` are equal on all ranks."""

    def __init__(self, cache: Any) -> None:
        self.costs = Costs()
        self.needed_adapters = 1.0  # that a batch is expected to use
        self.popularity = Popularity()
        self._batch_size = BatchSize()
        self._prefill = PrefillCost(self.costs.recompute)
        self._link = LinkCost(self.costs.load, self.costs.load_latency)
        self._cache = cache
        self._launched_s = self._last_result_s = 0.0
        self._num_steps = 0

    def launch(self) -> None:
        """A batch is handed to the device."""
        self._launched_s = time.monotonic()

    def result(self, batch: ScheduleBatch) -> None:
        """A batch's result is there. With batches in a row, each begins where the last ended."""
        now_s = time.monotonic()
        seconds = now_s - max(self._launched_s, self._last_result_s)
        self._last_result_s = now_s
        self._batch_size.add(now_s, len(batch.reqs))
        if batch.forward_mode.is_extend() and batch.extend_lens and seconds > 0:
            self._prefill.add(zip(batch.extend_lens, batch.prefix_lens, strict=True), seconds)

    def copied(self, num_slots: int, seconds: float) -> None:
        """An adapter was copied from the host."""
        self._link.add(num_slots, seconds)

    def step(self) -> None:
        """Once per iteration of the scheduler."""
        self._num_steps += 1
        if self._num_steps % SYNC_STEPS:
            return
        needed = self.popularity.expected_distinct(self._batch_size.mean)
        values = [
            self._prefill.per_token,
            self._prefill.context_share,
            self._link.per_slot,
            self._link.latency,
            needed,
        ]
        costs = self.costs
        (
            costs.recompute,
            costs.attention_share,
            costs.load,
            costs.load_latency,
            self.needed_adapters,
        ) = self._of_first_rank(values)

    def _of_first_rank(self, values: list[float]) -> list[float]:
        if self._cache.tp_world_size == 1:
            return values
        is_first = torch.distributed.get_rank(self._cache.tp_group) == 0
        tensor = torch.tensor(values, dtype=torch.float64)
        if not is_first:
            tensor.fill_(float("inf"))
        self._cache._all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        first: list[float] = tensor.tolist()
        return first


def note_result(result: None, self: Scheduler, batch: ScheduleBatch, *_: Any, **__: Any) -> None:
    """After ``Scheduler.process_batch_result``."""
    measure = getattr(self.tree_cache, "measure", None)
    if measure is not None:
        measure.result(batch)
