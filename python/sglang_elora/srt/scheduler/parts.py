"""The ELORA components of a scheduler process, and how hooks access them."""

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
    """The ELORA components of one scheduler process; created by ``assembly.create_cache``."""

    residency: Residency
    measured: MeasuredCosts
    swapper: Swapper
    admission: Admission


def elora_of(owner: Scheduler | PrefillAdder) -> Elora | None:
    """The components of the owner's scheduler; None without LoRA, or with SGLang's own cache."""
    found: Elora | None = getattr(owner.tree_cache, "elora", None)
    return found
