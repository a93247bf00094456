"""Hook bodies that measure the times of batches, for ``MeasuredCosts``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_elora.srt.scheduler.parts import elora_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler


def time_batch(
    original: Callable[..., Any], self: Scheduler, batch: ScheduleBatch, *args: Any, **options: Any
) -> Any:
    """Mark begin and end of a batch on its result. Runs around ``Scheduler.run_batch``; the result
    is processed later."""
    elora = elora_of(self)
    if elora is None:
        return original(self, batch, *args, **options)
    measure = elora.measured
    loads_kv = batch.hicache_consumer_index >= 0
    measure.batch_waited, begun = False, measure.mark(self)
    result = original(self, batch, *args, **options)
    if not measure.batch_waited and not loads_kv:
        result.elora_marks = (begun, measure.mark(self))
    return result


def note_result(
    result: None, self: Scheduler, batch: ScheduleBatch, ran: Any, *_: Any, **__: Any
) -> None:
    """Record the time of a batch. Runs after ``Scheduler.process_batch_result``."""
    elora = elora_of(self)
    if elora is not None:
        elora.measured.result(batch, getattr(ran, "elora_marks", None))
