"""Online estimators of costs and popularity, for policies and the planner. They read no clock:
callers pass times."""

from __future__ import annotations

__all__ = ["BatchSize", "LinkCost", "OnlineCosts", "Popularity", "PrefillCost"]

from sglang_elora.estimators.batch_size import BatchSize
from sglang_elora.estimators.online_costs import OnlineCosts
from sglang_elora.estimators.popularity import Popularity
from sglang_elora.estimators.rates import LinkCost, PrefillCost
