"""The policy that the configuration names, with what it reads of a running server."""

from __future__ import annotations

from sglang_elora.config import EloraConfig
from sglang_elora.host.measure import Measure
from sglang_elora.policy import GDSF, LRU, Elora, EloraPaper, Policy, Term
from sglang_elora.tree import AdapterForest


def make_policy(config: EloraConfig, measure: Measure, forest: AdapterForest) -> Policy:
    if config.policy == EloraPaper.name:
        return EloraPaper(
            measure.costs,
            needed_adapters=lambda: measure.needed_adapters,
            resident_adapters=lambda: forest.num_resident,
            off=frozenset(map(Term, config.policy_terms_off)),
        )
    by_name: dict[str, type[Policy]] = {policy.name: policy for policy in (LRU, GDSF, Elora)}
    return by_name[config.policy](measure.costs)
