"""What is learned online, for policies and the swapper. Pure: times come from outside."""

from __future__ import annotations

__all__ = ["BatchSize", "LinkCost", "OnlineCosts", "Popularity", "PrefillCost"]

from sglang_elora.estimators.batch_size import BatchSize
from sglang_elora.estimators.online_costs import OnlineCosts
from sglang_elora.estimators.popularity import Popularity
from sglang_elora.estimators.rates import LinkCost, PrefillCost
