"""Measured costs of prefill and of host-to-device copies, for the policies and the planner.

Measured times differ between tensor-parallel ranks, but decisions must not: all ranks use the
values of rank 0, and refresh them at the same scheduler iteration.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from sglang_elora.estimators import OnlineCosts

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

Mark = Any
"""A point in time on the stream that batches run on: an event, or seconds of the clock on a CPU."""


class MeasuredCosts(OnlineCosts):
    """Measured costs of one scheduler process.

    Args:
        cache: The ``UnifiedRadixCache``, whose process group is used.
        is_async: Batches run on a device stream, not in the scheduler's thread.
    """

    def __init__(self, cache: Any, *, is_async: bool = False) -> None:
        super().__init__(self._of_first_rank)
        self._cache = cache
        self._is_async = is_async
        self.batch_waited = False  # whether the current batch waits for a copy

    def mark(self, scheduler: Scheduler) -> Mark:
        """A mark after all work queued for batches so far.

        With overlap, the scheduler queues batches on its forward stream, otherwise on the current
        stream (see ``Scheduler.run_batch``).
        """
        if not self._is_async:
            return time.monotonic()
        device: Any = torch.get_device_module(scheduler.device)
        stream = scheduler.forward_stream if scheduler.enable_overlap else device.current_stream()
        event = device.Event(enable_timing=True)
        event.record(stream)
        return event

    def result(self, batch: ScheduleBatch, marks: tuple[Mark, Mark] | None) -> None:
        """Record the time of a batch whose result the scheduler has processed.

        Args:
            batch: The batch.
            marks: Its begin and end; None if it waited for a copy, which is not prefill time.
        """
        self.batch(time.monotonic(), len(batch.reqs))
        if marks is not None and batch.forward_mode.is_extend() and batch.extend_lens:
            begun, ended = marks
            seconds = self._seconds(begun, ended)
            self.prefill(zip(batch.extend_lens, batch.prefix_lens, strict=True), seconds)

    def _seconds(self, begun: Mark, ended: Mark) -> float:
        if not self._is_async:
            return float(ended - begun)
        # ``ended`` is recorded after the event that the scheduler has waited for, and
        # ``elapsed_time`` raises until both events have run.
        ended.synchronize()
        return float(begun.elapsed_time(ended) / 1e3)

    def _of_first_rank(self, *values: float) -> tuple[float, ...]:
        if self._cache.tp_world_size == 1:
            return values
        is_first = torch.distributed.get_rank(self._cache.tp_group) == 0
        tensor = torch.tensor(values, dtype=torch.float64)
        if not is_first:
            tensor.fill_(float("inf"))
        self._cache._all_reduce(tensor, torch.distributed.ReduceOp.MIN)
        return tuple(tensor.tolist())
