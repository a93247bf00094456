"""The link from host to device: one direction, transfers in order."""

from __future__ import annotations

from sglang_elora.sim.calibration import Calibration


class Link:
    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self.free_s = 0.0
        self.num_slots = 0  # moved

    def copy(self, now_s: float, num_slots: int, num_copies: int) -> float:
        """When a transfer that is handed in now is over."""
        self.num_slots += num_slots
        took_s = self._calibration.to_device_s(num_slots, num_copies)
        self.free_s = max(now_s, self.free_s) + took_s
        return self.free_s
