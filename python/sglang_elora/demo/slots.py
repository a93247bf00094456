"""Effect of a fixed number of adapter slots on the turns of a run: computed, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_elora.demo.turns import TurnRecord

SGLANG_SLOTS = 8
"""SGLang's default of ``--max-loras-per-batch``. With more slots, fewer turns wait and less KV
fits."""


@dataclass(frozen=True, slots=True)
class SlotDemand:
    """Concurrently used adapters, compared with a fixed number of slots.

    A turn is in flight from its request to the last token of its answer. The times are those of
    the recorded run: that a waiting turn would delay later turns is not modelled.
    """

    num_slots: int
    most_adapters: int  # largest number of adapters in flight at one time
    num_turns: int
    num_over: int  # turns sent while ``num_slots`` or more other adapters were in flight

    @property
    def share_over(self) -> float:
        """``num_over`` as a share of all turns, 0 to 1."""
        return self.num_over / self.num_turns if self.num_turns else 0.0


def slot_demand(records: Sequence[TurnRecord], num_slots: int = SGLANG_SLOTS) -> SlotDemand:
    """The demand of the answered turns; O(n^2) in their number."""
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
