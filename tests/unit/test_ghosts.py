"""KV that left both tiers: what is learned of it, and how it is recognised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.policy import LRU, CacheEntry, Costs, Elora, SessionState
from sglang_elora.tree import Ghosts, PrefixHash, end_turn
from sglang_elora.tree import ghosts as module

KEPT = Elora.ghost_turnovers


class Observed(Elora):
    """Records the ends that it observes."""

    def __init__(self) -> None:
        super().__init__(Costs())
        self.ends: list[tuple[float, bool]] = []

    def _observe(self, item: CacheEntry, *, returned: bool) -> None:
        if item.last >= 0:
            self.ends.append((self.clock - item.last, returned))


def dropped(policy: Observed, turns: int = 2) -> CacheEntry:
    item = CacheEntry(False, 10, turns=turns)
    policy.create(item)
    return item


def test_late_reuse_of_dropped_kv_is_observed_with_its_age() -> None:
    policy = Observed()
    ghosts = Ghosts(policy)
    item = dropped(policy)
    policy.advance(1.0)
    ghosts.add("a", 1, item)
    assert policy.ends == [] and len(ghosts) == 1
    policy.advance(0.5)
    new = CacheEntry(False, 30)
    ghosts.recall("b", [1], new)
    ghosts.recall("a", [2, 3], new)
    assert policy.ends == []
    ghosts.recall("a", [3, 1], new)
    assert policy.ends == [(1.5, True)] and len(ghosts) == 0
    end_turn([new])
    assert new.turns == 3, "the conversation goes on"


def test_dropped_kv_that_is_not_reused_is_observed_until_its_ghost_expires() -> None:
    policy = Observed()
    ghosts = Ghosts(policy)
    ghosts.add("a", 1, dropped(policy))
    policy.advance(KEPT + 1)
    ghosts.add("a", 2, dropped(policy))
    assert policy.ends == [(KEPT + 1, False)]
    assert len(ghosts) == 1 and ghosts.has("a")
    ghosts.clear()
    assert policy.ends == [(KEPT + 1, False), (0.0, False)]
    assert not ghosts.has("a")


def test_ghosts_are_bounded_and_replaced_by_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Ghosts._expire, "__defaults__", (3,))
    policy = Observed()
    ghosts = Ghosts(policy)
    for key in (1, 1, 2, 3, 4):
        ghosts.add("a", key, dropped(policy))
    assert len(ghosts) == 3 and len(policy.ends) == 2


def test_kv_of_named_sessions_and_of_other_policies_leaves_no_ghost() -> None:
    policy = Observed()
    ghosts = Ghosts(policy)
    item = dropped(policy)
    item.session_state = SessionState.OVER
    ghosts.add("a", 1, item)
    assert policy.ends == [(0.0, False)] and len(ghosts) == 0
    without = Ghosts(LRU(Costs()))
    without.add("a", 1, CacheEntry(False, 10))
    assert len(without) == 0


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=60), st.data())
def test_prefix_hash_does_not_depend_on_where_nodes_end(
    tokens: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(tokens) - 1))
    whole = PrefixHash().after(0, 0, np.array(tokens, np.int64)).tolist()
    hasher = PrefixHash()
    first = hasher.after(0, 0, np.array(tokens[:cut], np.int64)).tolist()
    rest = hasher.after(first[-1] if cut else 0, cut, np.array(tokens[cut:], np.int64)).tolist()
    assert first + rest == whole


def test_prefix_hash_differs_with_order_and_content() -> None:
    hasher = PrefixHash()
    found = {
        int(hasher.after(0, 0, np.array(tokens, np.int64))[-1])
        for tokens in ([1, 2, 3], [3, 2, 1], [1, 2, 4], [1, 2], [0, 1, 2, 3], [1, 2, 3, 0])
    }
    assert len(found) == 6
