"""Time transformation that speeds a trace up progressively."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rise:
    """Speed-up of a trace of ``duration_s``, by a factor that rises from ``low`` to ``high``
    exponentially in the time of that trace.

    Raises:
        ValueError: Unless 0 < low < high.
    """

    low: float
    high: float
    duration_s: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"rate factors must be 0 < low < high, got {self.low} and {self.high}")

    @property
    def _growth(self) -> float:
        return math.log(self.high / self.low) / self.duration_s

    @property
    def new_duration_s(self) -> float:
        return self.new_time(self.duration_s)

    def factor(self, time_s: float) -> float:
        """The speed-up factor at a time of the original trace."""
        return self.low * math.exp(self._growth * min(time_s, self.duration_s))

    def new_time(self, time_s: float) -> float:
        """The time in the new trace of a time of the original one."""
        return (1 - math.exp(-self._growth * time_s)) / (self.low * self._growth)

    def share_at(self, new_time_s: float) -> float:
        """The completed share of the rise at a time of the new trace: 0 to 1, logarithmic in the
        factor."""
        factor = self.low / (1 - self.low * self._growth * min(new_time_s, self.new_duration_s))
        return math.log(factor / self.low) / math.log(self.high / self.low)

    def factor_behind(self, share: float) -> float:
        """The factor at a share of the rise."""
        return self.low * math.pow(self.high / self.low, share)
