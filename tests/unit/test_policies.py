"""One contract for every policy, and each equation against numbers computed by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_elora.config import POLICIES
from sglang_elora.policy import (
    GDSF,
    LRU,
    NEVER,
    CacheEntry,
    Costs,
    Elora,
    EloraPaper,
    Policy,
    SessionState,
    Term,
)
from sglang_elora.policy.elora_paper import ADAPTER, KV, log_add_exp, lora_eval
from sglang_elora.tree import EvictionOrder


@dataclass
class Counts:
    """What ``EloraPaper`` reads of the server."""

    needed: float = 1.0
    resident: int = 1


def paper(
    costs: Costs | None = None,
    counts: Counts | None = None,
    off: tuple[Term, ...] = (),
    time_constant: float = 1.0,
) -> EloraPaper:
    counts = counts or Counts()
    return EloraPaper(
        costs or Costs(),
        lambda: counts.needed,
        lambda: counts.resident,
        frozenset(off),
        time_constant,
    )


MAKERS: dict[str, Callable[[], Policy]] = {
    "lru": lambda: LRU(Costs()),
    "gdsf": lambda: GDSF(Costs()),
    "elora_paper": paper,
    "elora": lambda: Elora(Costs()),
}


@pytest.fixture(params=MAKERS)
def policy(request: pytest.FixtureRequest) -> Policy:
    return MAKERS[request.param]()


def kv(num_slots: int = 100, **options: int | bool) -> CacheEntry:
    return CacheEntry(False, num_slots, **options)


def adapter(num_slots: int = 100) -> CacheEntry:
    return CacheEntry(True, num_slots, backed=True)


def rank(policy: Policy, item: CacheEntry) -> float:
    return policy.rank(policy.kind(item), policy.priority(item))


# ==== What holds for each ====


def test_policy_names_equal_the_flag_values() -> None:
    assert {make().name for make in MAKERS.values()} == set(MAKERS) == set(POLICIES)


def test_visited_entry_ranks_above_an_equal_unvisited_one(policy: Policy) -> None:
    for make in (kv, adapter):
        first, second = make(), make()
        policy.create(first)
        policy.create(second)
        policy.advance(0.5)
        policy.visit([first])
        policy.advance(0.5)
        assert rank(policy, first) > rank(policy, second)


def test_new_entry_ranks_finitely_and_above_an_older_equal_one(policy: Policy) -> None:
    """Entries have no owner: a new one ranks finitely, and above an older one of its class."""
    old, new = kv(), kv()
    policy.create(old)
    policy.advance(1)
    policy.create(new)
    assert math.isfinite(rank(policy, old))
    assert rank(policy, old) <= rank(policy, new)


def test_never_requested_adapter_has_the_lowest_rank(policy: Policy) -> None:
    unseen, seen, text = adapter(), adapter(), kv()
    policy.visit([seen])
    policy.create(text)
    policy.advance(10)
    assert rank(policy, unseen) < min(rank(policy, seen), rank(policy, text))


def test_split_entry_keeps_visits_and_class_in_both_halves(policy: Policy) -> None:
    item = kv(100)
    policy.create(item)
    policy.visit([item])
    first = policy.split(item, 30)
    assert (first.num_slots, item.num_slots) == (30, 70)
    assert first.visits == item.visits == 2
    assert policy.kind(first) == policy.kind(item)


def test_lru_ranks_the_deepest_node_of_a_path_highest() -> None:
    policy = LRU(Costs())
    leaf, parent = kv(), kv()
    policy.visit([leaf, parent])
    assert policy.priority(leaf) > policy.priority(parent)


@dataclass
class PolicyWorld:
    """Entries are created, visited and removed; an ``EvictionOrder`` keeps the policy's order."""

    policy: Policy
    items: list[CacheEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.victims: list[tuple[bool, int, int]] = []
        self.order: EvictionOrder[CacheEntry] = EvictionOrder(
            self.policy.priority, self.policy.kind, self.policy.rank
        )

    def act(self, rng: random.Random) -> None:
        action = rng.choice(["kv", "adapter", "visit", "visit", "visit", "time", "back", "evict"])
        policy = self.policy
        if action in ("kv", "adapter"):
            item = kv(rng.randint(1, 500)) if action == "kv" else adapter(rng.randint(10, 900))
            policy.create(item)
            self.items.append(item)
            self.order.add(item)
        elif action == "time":
            policy.advance(rng.choice([1 / 64, 5 / 16, 5.0]))
        elif not self.items:
            return
        elif action == "visit":
            item = rng.choice(self.items)
            policy.visit([item])
            self.order.lower(item)  # its class may have changed
        elif action == "back":
            item = rng.choice(self.items)
            if not item.backed:
                item.backed = True
                self.order.lower(item)
        else:
            expected = min(rank(policy, item) for item in self.items)
            item = self.order.take_lowest()
            assert item is not None
            assert rank(policy, item) == pytest.approx(expected, abs=1e-9)
            self.victims.append((item.is_adapter, item.num_slots, item.visits))
            policy.evict(item)
            policy.remove(item)
            self.order.discard(item)
            self.order.give_back()
            self.items.remove(item)
        self.order.check_invariants()


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_victim_has_the_lowest_rank_of_all_entries(name: str, seed: int) -> None:
    """After any history: the order kept in heaps equals ranking every entry again."""
    rng = random.Random(seed)
    world = PolicyWorld(MAKERS[name]())
    for _ in range(80):
        world.act(rng)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), later=st.floats(0.001, 50))
def test_priorities_do_not_fall_while_time_passes(name: str, seed: int, later: float) -> None:
    rng = random.Random(seed)
    world = PolicyWorld(MAKERS[name]())
    for _ in range(60):
        world.act(rng)
    before = [world.policy.priority(item) for item in world.items]
    world.policy.advance(later)
    after = [world.policy.priority(item) for item in world.items]
    assert all(b <= a + 1e-12 for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["lru", "gdsf", "elora"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), later=st.floats(0.001, 50))
def test_order_within_a_class_does_not_depend_on_query_time(
    name: str, seed: int, later: float
) -> None:
    rng = random.Random(seed)
    world = PolicyWorld(MAKERS[name]())
    for _ in range(60):
        world.act(rng)

    def order() -> list[tuple[int, int]]:
        by_kind = sorted(
            world.items, key=lambda i: (world.policy.kind(i), world.policy.priority(i), id(i))
        )
        return [(world.policy.kind(item), id(item)) for item in by_kind]

    before = order()
    world.policy.advance(later)
    assert order() == before


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None)
@given(shift=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
@example(shift=1, seed=14022)  # entries of equal weight: 200 slots and a visit, 100 slots and two
def test_policy_victims_do_not_depend_on_the_start_time(name: str, shift: float, seed: int) -> None:
    victims = []
    for start in (0.0, shift):
        rng, world = random.Random(seed), PolicyWorld(MAKERS[name]())
        world.policy.advance(start)
        for _ in range(120):
            world.act(rng)
        victims.append(world.victims)
    assert victims[0] == victims[1]


# ==== The paper's equations ====


@pytest.mark.parametrize(
    ("resident", "needed", "expected"),
    [(4, 8.0, 0.5), (8, 8.0, 1.0), (9, 3.0, 1.0), (0, 4.0, 0.25)],
)
def test_lora_eval_equals_hand_computed_values(
    resident: int, needed: float, expected: float
) -> None:
    assert lora_eval(resident, needed) == expected


def test_adapter_count_term_raises_adapter_ranks_only() -> None:
    """The sign of the adapter-count term: it is meant to keep adapters when they are needed."""
    counts = Counts(needed=8.0, resident=2)
    policy = paper(counts=counts)
    assert policy.rank(ADAPTER, 7.0) == pytest.approx(7 + math.log(4))
    assert policy.rank(KV, 7.0) == 7
    counts.resident = 8
    assert policy.rank(ADAPTER, 7.0) == 7
    counts.resident = 2
    assert paper(counts=counts, off=(Term.ADAPTER_COUNT,)).rank(ADAPTER, 7.0) == 7


def test_retain_eval_equals_a_hand_computed_value() -> None:
    """100 slots * 3 visits / (1 + e), one time constant after the last of them."""
    policy = paper(time_constant=0.5)
    item = kv(100)
    for _ in range(3):
        policy.visit([item])
    policy.advance(0.5)
    frame = policy.clock / 0.5
    by_hand = math.log(100) + math.log(3) - math.log(1 + math.e)
    assert policy.priority(item) - frame == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("term", "by_hand"),
    [
        (Term.SWAP_COST, math.log(3) - math.log(1 + math.e) + 1),
        (Term.VISIT_FREQUENCY, math.log(100) - math.log(1 + math.e) + 1),
        (Term.RECENCY, math.log(100) + math.log(3)),
    ],
)
def test_paper_policy_terms_can_each_be_disabled(term: Term, by_hand: float) -> None:
    policy = paper(off=(term,))
    item = kv(100)
    for _ in range(3):
        policy.visit([item])
    policy.advance(1)
    assert policy.priority(item) == pytest.approx(by_hand)


def test_paper_policy_recency_does_not_saturate() -> None:
    """In the paper's seconds, 1 - sigmoid(t) of everything an hour old is the same number: 0."""
    assert 1 - 1 / (1 + math.exp(-3600)) == 1 - 1 / (1 + math.exp(-7200)) == 0
    policy = paper()
    older, old = kv(), kv()
    policy.create(older)
    policy.advance(3600)
    policy.create(old)
    policy.advance(3600)
    assert policy.priority(older) < policy.priority(old)


@given(a=st.floats(-700, 700), b=st.floats(-700, 700))
def test_log_add_exp_equals_the_direct_formula(a: float, b: float) -> None:
    top = max(a, b)
    assert log_add_exp(a, b) == pytest.approx(top + math.log(math.exp(a - top) + math.exp(b - top)))


def test_log_add_exp_ignores_never() -> None:
    assert log_add_exp(NEVER, 2.0) == 2.0
    assert log_add_exp(NEVER, NEVER) == NEVER


# ==== GDSF ====


def test_gdsf_priorities_equal_hand_computed_values() -> None:
    costs = Costs(recompute=10.0, load=2.0, load_latency=0.0)
    policy = GDSF(costs)
    text, copied, weights = kv(), kv(backed=True), adapter()
    for item in (text, copied, weights):
        policy.create(item)
    policy.visit([text])
    assert [policy.priority(i) for i in (text, copied, weights)] == [20, 2, 2]
    policy.evict(text)  # later entries start at its priority
    late = kv()
    policy.create(late)
    assert policy.priority(late) == 30


# ==== ELORA's own ====


def test_elora_rank_is_proportional_to_seconds_saved_per_slot() -> None:
    """At equal returns: an adapter saves a load, KV a recompute, offloaded KV the cheaper one."""
    costs = Costs(recompute=40e-6, load=5e-6, load_latency=0.0)
    policy = Elora(costs)
    text, copied, weights = kv(), kv(backed=True), adapter()
    for item in (text, copied, weights):
        policy.create(item)
    assert rank(policy, text) == pytest.approx(8 * rank(policy, weights))
    assert rank(policy, copied) == rank(policy, weights)
    costs.load = 80e-6  # a slow link: computing is cheaper than loading
    assert rank(policy, text) == rank(policy, copied) == rank(policy, weights) / 2


def test_elora_rank_of_device_kv_includes_the_price_of_a_host_slot() -> None:
    costs = Costs(recompute=40e-6, load=5e-6, load_latency=0.0)
    policy = Elora(costs, writes_back=True)
    text, copied, weights = kv(), kv(backed=True), adapter()
    for item in (text, copied, weights):
        policy.create(item)
    index = rank(policy, weights) / costs.load

    def ranks(host_rank: float | None) -> list[float]:
        """Ranks per return of KV, of KV with a host copy, and of the adapter."""
        for _ in range(1000):
            policy.price_host(host_rank)
        return [rank(policy, item) / index for item in (text, copied, weights)]

    assert ranks(None) == pytest.approx([7.5e-6, 5e-6, 5e-6])  # the offload counts half
    saved = 0.1 * 35e-6
    assert ranks(0.1 * index) == pytest.approx([7.5e-6 + saved, 5e-6 + saved, 5e-6])
    assert ranks(9 * index) == pytest.approx([40e-6, 40e-6, 5e-6])  # dropped, not copied
    assert ranks(None) == pytest.approx([7.5e-6, 5e-6, 5e-6])


def test_elora_ranks_a_never_reused_class_low() -> None:
    """Each turn adds KV that is never hit; an adapter is hit at every turn."""
    policy = Elora(Costs(recompute=10e-6, load=10e-6, load_latency=0.0))
    popular, sentences = adapter(), []
    for _ in range(400):
        sentences.append(kv())
        policy.create(sentences[-1])
        policy.visit([popular])
        policy.advance(0.02)
        if len(sentences) > 50:
            policy.remove(sentences.pop(0))
    other = adapter()
    policy.create(other)
    assert rank(policy, other) > 8 * rank(policy, sentences[-1])
    assert not policy.worth_host_copy(sentences[-1])


def test_host_order_keeps_old_kv_that_is_about_to_return() -> None:
    """All return after 2 turnovers: entries close to their return stay, an ended one is evicted."""
    policy = Elora(Costs())
    chats = [kv() for _ in range(20)]
    gone = kv()
    policy.create(gone)
    for chat in chats:
        policy.create(chat)
    for i in range(400):
        policy.visit([chats[i % 20]])
        policy.advance(0.1)
    policy.learn()
    order: EvictionOrder[CacheEntry] = EvictionOrder(
        policy.priority, policy.host_kind, policy.host_rank
    )
    for item in (*chats, gone):
        order.add(item)
    assert order.lowest_rank() is not None
    taken = [order.take_lowest() for _ in range(21)]
    assert taken[0] is gone
    assert taken[-1] in chats[:6] and taken.index(chats[19]) < taken.index(chats[2])


def test_elora_keeps_a_reused_class_and_drops_it_when_overdue() -> None:
    policy = Elora(Costs())
    chats = [kv() for _ in range(40)]
    for chat in chats:
        policy.create(chat)
    for i in range(400):
        policy.visit([chats[i % 40]])
        policy.advance(0.02)
    assert policy.worth_host_copy(chats[-1])
    policy.advance(30)  # no entry ever returned that late
    assert rank(policy, chats[0]) < rank(policy, chats[-1]) * 1.01
    late = policy.rank(policy.kind(chats[0]), 0.0)
    new = kv()
    policy.create(new)
    assert rank(policy, new) > 20 * late


def test_elora_host_order_evicts_conversations_that_are_over_by_their_turns() -> None:
    """All conversations have three turns, 0.05 turnovers apart."""
    policy = Elora(Costs())
    for _ in range(200):
        item = kv()
        policy.create(item)
        for turn in (1, 2, 3):
            item.turns_of_user = turn
            policy.advance(0.05)
            if turn < 3:
                policy.visit([item])
        policy.advance(1.0)
        policy.remove(item)
    policy.learn()
    begun, over = kv(turns_of_user=1), kv(turns_of_user=3)
    policy.create(begun)
    policy.create(over)

    def host_rank(item: CacheEntry) -> float:
        return policy.host_rank(policy.host_kind(item), policy.host_priority(item))

    assert host_rank(begun) > 5 * host_rank(over)
    assert rank(policy, begun) == rank(policy, over), "the order on the device ignores turns"
    over.session_state = SessionState.ALIVE
    assert policy.host_kind(over) != policy.host_kind(begun)
    over.turns_of_user = 1
    kind = policy.host_kind(over)
    over.turns_of_user = 3
    assert policy.host_kind(over) == kind, "a named session has precedence"


def test_elora_learns_that_kv_beside_a_conversation_is_not_used_again() -> None:
    """KV of activated adapters is never reused here, KV of the base model always."""
    policy = Elora(Costs(), writes_back=True)
    for _ in range(300):
        said, question = kv(), kv(group="judge", is_activated=True)
        policy.create(said)
        policy.create(question)
        policy.advance(0.1)
        policy.visit([said])
        policy.remove(question)
    policy.learn()
    said, question = kv(), kv(group="judge", is_activated=True)
    for item in (said, question):
        policy.create(item)
        policy.place(item)
    assert rank(policy, said) > 5 * rank(policy, question)
    assert policy.host_kind(said) != policy.host_kind(question)


def test_elora_ranks_a_popular_adapter_above_a_rare_one_that_was_used_as_recently() -> None:
    policy = Elora(Costs())
    popular, rare = (CacheEntry(True, 100, name, backed=True) for name in ("popular", "rare"))
    for item in (popular, rare):
        policy.place(item)
    for _ in range(20):
        policy.advance(0.1)
        policy.visit([popular])
    policy.visit([rare])
    assert 2 < rank(policy, popular) / rank(policy, rare) < 20
    policy.advance(30)
    policy.visit([rare])
    assert rank(policy, popular) < rank(policy, rare), "popularity is forgotten"
