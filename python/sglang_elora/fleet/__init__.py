"""Adapters on many servers: which server should hold which, and the orders that bring it about."""

from sglang_elora.fleet.controller import Controller, Order
from sglang_elora.fleet.loads import Loads
from sglang_elora.fleet.placement import NewCopy, Placement, preference

__all__ = ["Controller", "Loads", "NewCopy", "Order", "Placement", "preference"]
