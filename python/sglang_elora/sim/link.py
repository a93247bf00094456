"""The simulated link from host to device: one direction, transfers in order."""

from __future__ import annotations

from sglang_elora.sim.calibration import Calibration


class Link:
    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self.free_s = 0.0
        self.kv_free_s = 0.0  # end of the last transfer of KV
        self.num_slots = 0  # transferred

    def load_kv(self, now_s: float, num_slots: int) -> float:
        """Start a transfer of KV; returns when it ends."""
        self.kv_free_s = self.copy(now_s, num_slots, self._calibration.copies_per_kv_load)
        return self.kv_free_s

    def copy(self, now_s: float, num_slots: int, num_copies: int) -> float:
        """Start a transfer of ``num_copies`` copies; returns when it ends."""
        self.num_slots += num_slots
        took_s = self._calibration.to_device_s(num_slots, num_copies)
        self.free_s = max(now_s, self.free_s) + took_s
        return self.free_s
