"""What fixed adapter slots would have meant for the turns of a run: computed, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_elora.demo.turns import TurnRecord

SGLANG_SLOTS = 8
"""SGLang's default of ``--max-loras-per-batch``. More slots: fewer turns wait, less KV fits."""


@dataclass(frozen=True, slots=True)
class SlotDemand:
    """Adapters in flight at once, beside a fixed number of slots.

    A turn is in flight from its request to the last token of its answer. The times are those of
    the run that was recorded: that a turn which waits delays the turns after it is not counted.
    """

    num_slots: int
    most_adapters: int  # in flight at one time
    num_turns: int
    num_over: int  # turns sent while as many other adapters as there are slots were in flight

    @property
    def share_over(self) -> float:
        """``num_over`` as a share of all turns, 0 to 1."""
        return self.num_over / self.num_turns if self.num_turns else 0.0


def slot_demand(records: Sequence[TurnRecord], num_slots: int = SGLANG_SLOTS) -> SlotDemand:
    """The demand of the answered turns; quadratic in their number."""
    most, over = 0, 0
    for record in records:
        in_flight = {
            other.adapter
            for other in records
            if other is not record and other.sent_s <= record.sent_s < other.sent_s + other.total_s
        }
        most = max(most, len(in_flight | {record.adapter}))
        over += record.adapter not in in_flight and len(in_flight) >= num_slots
    return SlotDemand(num_slots, most, len(records), over)
