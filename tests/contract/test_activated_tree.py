"""KV of activated adapters in the tree: below KV of the base model, and found by nobody else."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_elora.policy import Costs
from sglang_elora.policy.cache_entry import UNCOUNTED
from sglang_elora.policy.elora import Elora
from sglang_elora.tree import (
    ActivatedNamespace,
    adapter_of,
    base_namespace,
    last_occurrence,
    namespace_of,
)
from tests.harness.adapter_cache import AdapterCache

INVOCATIONS = {"a": (1, 2), "b": (1, 2), "c": (3,), "plain": ()}


class ActivatedCache(AdapterCache):
    """A cache that knows what each slot holds: whose KV, of which tokens."""

    def __init__(self, num_slots: int, page_size: int = 1) -> None:
        super().__init__(num_slots, page_size=page_size)
        self.core.full.lock_adapters()
        self.page_size = page_size
        self.holds: dict[int, tuple[Any, ...]] = {}

    def namespace(self, tokens: tuple[int, ...], adapter_id: str | None, extra: str) -> Any:
        """As ``Admission.activate`` sets it."""
        base = base_namespace(extra)
        if adapter_id is None:
            return base
        if not (invocation := INVOCATIONS[adapter_id.partition("@")[0]]):
            return namespace_of(adapter_id, extra)
        start = last_occurrence(tokens, invocation)
        if start is None:
            return base
        return ActivatedNamespace.of(adapter_id, extra, base, start, self.page_size)

    def content(self, tokens: tuple[int, ...], adapter_id: str | None, extra: str) -> list[Any]:
        """What the KV of each token depends on."""
        start: int | None = 0
        if adapter_id is None:
            start = None
        elif invocation := INVOCATIONS[adapter_id.partition("@")[0]]:
            start = last_occurrence(tokens, invocation)
        found = []
        for i in range(len(tokens)):
            is_base = start is None or i < start
            who = None if is_base else (adapter_id, start)
            found.append((extra, who, tokens[: i + 1]))
        return found

    def ask(self, tokens: tuple[int, ...], adapter_id: str | None, extra: str = "") -> int:
        """Run one request: match, lock, make room, insert. Returns the number of tokens found.

        Raises:
            AssertionError: It found KV that is not its own.
        """
        namespace = self.namespace(tokens, adapter_id, extra)
        content = self.content(tokens, adapter_id, extra)
        match = self.match(tokens, namespace)
        slots = self.slots(match, namespace).tolist()
        assert len(slots) == match.device_prefix_len
        for slot, own in zip(slots, content, strict=False):
            assert self.holds[slot] == own, (adapter_id, tokens)
        lock = self.tree.lock(match.last_device_node)
        needed = adapter_of(namespace)
        assert needed is None or self.core.is_locked(needed)
        self.make_room(len(tokens))
        new = self.allocator.alloc(len(tokens))
        if new is not None:
            params = self._sglang.base.InsertParams(
                key=self._key(tokens, namespace), value=new, prev_prefix_len=0
            )
            self.holds |= dict(zip(new.tolist(), content, strict=True))
            kept = self.tree.insert(params).last_device_node
            path = self.slots(match._replace(last_device_node=kept), namespace).tolist()
            assert [self.holds[slot] for slot in path] == content
        self.tree.unlock(lock)
        return len(slots)


def loaded(page_size: int = 1, num_slots: int = 400) -> ActivatedCache:
    cache = ActivatedCache(num_slots, page_size)
    cache.core.use_policy(Elora(Costs()), num_slots)
    for adapter_id in INVOCATIONS:
        cache.add(adapter_id, 8)
        assert cache.load(adapter_id)
    return cache


def test_adapters_share_the_kv_before_their_invocation() -> None:
    cache = loaded()
    conversation = tuple(range(10, 60))
    assert cache.ask(conversation, None) == 0
    assert cache.ask((*conversation, 1, 2, 9), "a") == 50
    assert cache.ask((*conversation, 1, 2, 9), "b") == 50  # not what "a" computed
    assert cache.ask((*conversation, 1, 2, 9), None) == 50
    assert cache.ask((*conversation, 1, 2, 9), "a") == 53
    assert cache.ask((*conversation, 3), "c") == 50
    cache.check()


def test_base_model_finds_what_an_adapter_computed_before_its_invocation() -> None:
    cache = loaded()
    conversation = tuple(range(10, 60))
    assert cache.ask((*conversation, 3, 9), "c") == 0
    assert cache.ask((*conversation, 3, 9), None) == 50
    assert cache.ask((*conversation, 3, 9), "plain") == 0
    cache.check()


def test_only_the_last_invocation_counts() -> None:
    cache = loaded()
    once, twice = (*range(10, 30), 3, 40, 41), (*range(10, 30), 3, 40, 41, 3, 50)
    assert cache.ask(once, "c") == 0
    assert cache.ask(twice, "c") == 20  # the adapter's own KV of the first turn is none of these
    assert cache.ask(twice, "c") == 25
    cache.check()


def test_extra_key_separates_both_parts() -> None:
    cache = loaded()
    tokens = (*range(10, 30), 3, 40)
    assert cache.ask(tokens, "c", "x") == 0
    assert cache.ask(tokens, "c", "y") == cache.ask(tokens, "c") == 0
    assert cache.ask(tokens, "c", "x") == 22
    assert cache.ask(tokens, None, "x") == 20
    cache.check()


def test_cache_salt_separates_both_parts() -> None:
    cache = loaded()
    tokens = (*range(10, 30), 3, 40)
    for salt, found in (("s", 0), ("t", 0), (None, 0), ("s", 22)):
        cache.salt = salt
        assert cache.ask(tokens, "c") == found
    assert cache.ask(tokens, None) == 20
    cache.check()


def test_kv_of_another_content_version_is_not_found() -> None:
    """SGLang gives an adapter that is loaded again a new id."""
    cache = loaded()
    tokens = (*range(10, 30), 3, 40)
    cache.ask(tokens, "c")
    cache.unload("c")
    assert "c" not in cache.adapter_table
    cache.add("c@2", 8)
    cache.load("c@2")
    assert cache.ask(tokens, "c@2") == 20
    cache.check()


def test_unloading_keeps_what_is_the_base_models() -> None:
    cache = loaded()
    cache.ask((*range(10, 30), 3, 40), "c")
    cache.unload("c")
    assert cache.ask(tuple(range(10, 30)), None) == 20
    cache.check()


def test_base_kv_is_evicted_after_the_kv_that_depends_on_it() -> None:
    cache = loaded()
    cache.ask((*range(10, 30), 3, 40), "c")
    assert cache.evict(1) == 8  # an adapter that nobody used
    cache.ask(tuple(range(10, 30)), None)
    while cache.evict(1):
        cache.check()
    assert cache.allocator.available_size() == 400


def test_request_that_found_base_kv_only_locks_its_adapter() -> None:
    cache = loaded()
    cache.ask(tuple(range(10, 30)), None)
    tokens = (*range(10, 30), 3, 40)
    lock = cache.tree.lock(cache.match(tokens, cache.namespace(tokens, "c", "")).last_device_node)
    cache.evict(400)
    assert cache.adapter_table.get("c").resident and not cache.adapter_table.get("a").resident
    cache.check()
    cache.tree.unlock(lock)
    cache.evict(400)
    assert not cache.adapter_table.get("c").resident
    cache.check()


def test_any_lock_of_activated_kv_locks_its_adapter() -> None:
    """Such as that of a copy to the host, which knows a node only."""
    cache = loaded()
    tokens = (*range(10, 30), 3, 40)
    cache.ask(tokens, "c")
    node = int(cache.match(tokens, cache.namespace(tokens, "c", "")).last_device_node)
    receipt = cache.lock(node)
    before = cache.tree.evictable_size()
    assert cache.evict(400) == before == 8 * 3
    cache.check()
    cache.unlock(node, receipt)
    assert cache.evict(400) == 22 + 8


def test_request_visits_its_adapter_and_the_base_kv_that_it_found() -> None:
    cache = loaded()
    cache.ask(tuple(range(10, 30)), None)
    tokens = (*range(10, 30), 3, 40)
    visited: list[list[Any]] = []
    namespace, adapter = cache.namespace(tokens, "c", ""), cache.adapter_table.get("c").entry
    for num_nodes in (2, 3):  # the second time, KV of its own too
        node = cache.match(tokens, namespace).last_device_node
        cache.core.policy = SimpleNamespace(visit=visited.append)
        cache.core.visit(node)
        cache.core.policy = None
        assert len(visited[-1]) == num_nodes
        assert [entry is adapter for entry in visited[-1]].count(True) == 1
        assert visited[-1][-1] is adapter
        cache.ask(tokens, "c")


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(20))
def test_no_request_finds_kv_of_another(seed: int, page_size: int) -> None:
    """Random conversations that branch, over few tokens, in a pool with room for some of them."""
    rng = random.Random(seed)
    cache = loaded(page_size, num_slots=240)
    conversations: list[tuple[int, ...]] = [()]
    num_found = 0
    for step in range(150):
        tokens = rng.choice(conversations[-10:])[: rng.randrange(0, 81, page_size)]
        tokens += tuple(rng.choices(range(1, 6), k=page_size * rng.randrange(1, 20 // page_size)))
        conversations.append(tokens)
        adapter_id = rng.choice([None, None, *INVOCATIONS])
        if adapter_id is not None and not cache.load(adapter_id):
            continue
        num_found += cache.ask(tokens, adapter_id, rng.choice(["", "", "x"]))
        if step % 40 == 39:
            cache.evict(rng.randrange(200))
        cache.check()
    assert num_found > 200


def test_policy_sees_that_kv_is_of_an_activated_adapter_and_no_turn() -> None:
    cache = loaded()
    said = tuple(range(10, 60))
    cache.ask(said, None)
    cache.ask((*said, 3, 9), "c")
    for namespace, tokens, is_activated in (
        (None, said, False),
        (cache.namespace((*said, 3, 9), "c", ""), (*said, 3, 9), True),
    ):
        end = cache.match(tokens, namespace).last_device_node
        assert cache.core.node_by_id(end).entry.is_activated is is_activated
        cache.core.end_turn(cache.core.node_by_id(end))
    turns = [node.entry.turns for node in cache.core.path_of(cache.core.node_by_id(end))]
    assert turns == [1, 1, UNCOUNTED], "question, conversation, adapter"
