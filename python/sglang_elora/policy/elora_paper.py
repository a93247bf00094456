"""The cost model of the ELORA paper. Each term can be switched off.

Source: ELORA (HPCA 2026), section on the performance-driven cache swapper:
``Eval = LoRA_Eval * Retain_Eval`` with ``LoRA_Eval = min(1, Now_LoRA / Low_lora)`` and
``Retain_Eval = cost * visit * (1 - sigmoid(t))``; the entry of lowest Eval is the victim.

Choices where the paper is ambiguous:

* ``t`` has no unit, and ``sigmoid`` of seconds is 1 for every old entry. Here ``t`` is in units of
  ``time_constant`` turnovers, and logarithms are compared, which do not saturate.
* Taken literally, ``LoRA_Eval`` lowers the Eval of every entry while too few adapters are resident.
  It is meant to keep adapters then, so here it divides, and only for adapters: their Eval rises by
  ``Low / Now`` while fewer are resident than a batch is expected to need.
* ``cost`` is bytes over the link's bandwidth, which is the same for all entries and left out.
* ``visit`` is an entry's share of all visits. The total is the same for all entries and left out.
  The request that creates an entry counts as a visit; an adapter that was registered but never
  used has none and is evicted first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Self

from typing_extensions import override

from sglang_elora.policy.cache_entry import NEVER, CacheEntry
from sglang_elora.policy.policy import Costs, Policy, PolicyContext
from sglang_elora.policy.registry import register

KV, ADAPTER = 0, 1
TIME_CONSTANT = 0.03
"""Turnovers; raising it makes recency count less. 0.03 was the best of 0.03 to 1 over the workloads
of benchmarks/replay/policies.py."""


class Term(Enum):
    """Terms of the model that the paper's ablation switches off, one at a time."""

    ADAPTER_COUNT = "adapter_count"
    SWAP_COST = "swap_cost"
    VISIT_FREQUENCY = "visit_frequency"
    RECENCY = "recency"


@register
class EloraPaper(Policy):
    """The paper's order: lowest Eval first (module docstring).

    Args:
        needed_adapters: ``Low_lora``: adapters that a batch is expected to use.
        resident_adapters: ``Now_LoRA``: adapters on the device.
        off: Terms that are left out.
        time_constant: Turnovers in which the weight of a visit falls to 1/e.
    """

    name = "elora_paper"

    def __init__(
        self,
        costs: Costs,
        needed_adapters: Callable[[], float],
        resident_adapters: Callable[[], int],
        off: frozenset[Term] = frozenset(),
        time_constant: float = TIME_CONSTANT,
    ) -> None:
        super().__init__(costs)
        self._needed_adapters = needed_adapters
        self._resident_adapters = resident_adapters
        self._off = off
        self._time_constant = time_constant

    @classmethod
    @override
    def build(cls, context: PolicyContext, **options: Any) -> Self:
        needed, resident = context.needed_adapters, context.resident_adapters
        return cls(context.costs, needed, resident, **options)

    def visit(self, path: Iterable[CacheEntry]) -> None:
        for item in path:
            item.visits += 1
            item.last = self.clock

    def kind(self, item: CacheEntry) -> int:
        return ADAPTER if item.is_adapter else KV

    def rank(self, kind: Any, priority: float) -> float:
        if kind == KV or Term.ADAPTER_COUNT in self._off:
            return priority
        return priority - math.log(lora_eval(self._resident_adapters(), self._needed_adapters()))

    def priority(self, item: CacheEntry) -> float:
        """``log Retain_Eval`` plus a term of the clock that is equal for all entries.

        ``1 - sigmoid(t) = 1 / (1 + exp(t))``. With ``clock`` added, its logarithm is
        ``-log(exp(-clock) + exp(-last))``, which rises a little with the clock and never falls.
        """
        if item.visits == 0:
            return NEVER
        weight = 1  # an integer, so that entries of equal weight have exactly equal ranks
        if Term.SWAP_COST not in self._off:
            weight *= item.num_slots
        if Term.VISIT_FREQUENCY not in self._off:
            weight *= item.visits
        rank = math.log(weight)
        if Term.RECENCY not in self._off:
            tau = self._time_constant
            rank -= log_add_exp(-self.clock / tau, -item.last / tau)
        return rank


def lora_eval(num_resident: int, num_needed: float) -> float:
    """``min(1, Now_LoRA / Low_lora)``, with at least one resident, so that it is never zero."""
    return min(1.0, max(num_resident, 1) / max(num_needed, 1.0))


def log_add_exp(a: float, b: float) -> float:
    """``log(exp(a) + exp(b))`` without overflow."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == NEVER else high + math.log1p(math.exp(low - high))
