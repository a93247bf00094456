"""What a scheduler with adapters in its KV pool has of ours, and where hooks find it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_elora.srt.measured_costs import MeasuredCosts
    from sglang_elora.srt.mem_cache.residency import Residency
    from sglang_elora.srt.scheduler.admission import Admission
    from sglang_elora.srt.scheduler.swapper import Swapper


@dataclass(frozen=True, slots=True)
class Elora:
    """One per scheduler process; ``assembly.create_cache`` makes it."""

    residency: Residency
    measured: MeasuredCosts
    swapper: Swapper
    admission: Admission


def elora_of(owner: Scheduler | PrefillAdder) -> Elora | None:
    """None where there are no adapters: without LoRA, and in a cache of SGLang's own."""
    found: Elora | None = getattr(owner.tree_cache, "elora", None)
    return found
