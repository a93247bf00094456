"""A trace-driven simulator of one server, which uses the server's policies, estimators and tree."""

from __future__ import annotations

__all__ = ["Calibration", "Clairvoyant", "Engine", "Record", "kv_slots", "make_engine"]

from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.clairvoyant import Clairvoyant
from sglang_elora.sim.engine import Engine
from sglang_elora.sim.request import Record
from sglang_elora.sim.sides import kv_slots, make_engine
