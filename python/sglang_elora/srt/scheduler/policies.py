"""The policy that the configuration names, with what it reads of a running server."""

from __future__ import annotations

from sglang_elora.config import EloraConfig
from sglang_elora.policy import GDSF, LRU, Elora, EloraPaper, Policy, Term
from sglang_elora.srt.measure import Measure
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore


def make_policy(config: EloraConfig, measure: Measure, core: EloraTreeCore) -> Policy:
    if config.policy == EloraPaper.name:
        return EloraPaper(
            measure.costs,
            needed_adapters=lambda: measure.needed_adapters,
            resident_adapters=lambda: core.forest.num_resident,
            off=frozenset(map(Term, config.policy_terms_off)),
        )
    if config.policy == Elora.name:
        return Elora(measure.costs, core.is_held, writes_back=core.is_write_back)
    return {LRU.name: LRU, GDSF.name: GDSF}[config.policy](measure.costs)
