"""Placement of adapters on the servers of a fleet. Imports neither SGLang nor torch."""

from __future__ import annotations

__all__ = ["Move", "Placement", "preference"]

from sglang_elora.fleet.placement import Move, Placement, preference
