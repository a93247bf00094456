"""Our radix cache evicts as SGLang's does, in the same order, from an incremental order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_elora.tree import EvictionOrder
from tests.harness.radix_cache import Cache, sglang

NUM_SLOTS = 600
NAMESPACES = (None, None, "lora//a", "lora//b")


def check(cache: Cache) -> None:
    cache.tree.sanity_check()
    cache.tree.tree_core.check_invariants()
    assert isinstance(cache.tree.tree_core.evictable_device_leaves, EvictionOrder)


def history(seed: int) -> Iterator[tuple[str, Any, str | None]]:
    """Random operations on conversations that branch and grow, some under an adapter."""
    rng = random.Random(seed)
    conversations: list[tuple[tuple[int, ...], str | None]] = [((1,), None)]
    for _ in range(250):
        tokens, namespace = rng.choice(conversations[-12:])
        kind = rng.choices(
            ["grow", "branch", "match", "lock", "unlock", "evict", "reset"],
            weights=[30, 15, 25, 10, 10, 12, 0.3],
        )[0]
        if kind == "branch":
            tokens = tokens[: rng.randint(0, len(tokens))]
            namespace = rng.choice(NAMESPACES)
        if kind in ("grow", "branch"):
            tokens += tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 25)))
            conversations.append((tokens, namespace))
            yield "insert", tokens, namespace
        elif kind == "evict":
            yield "evict", rng.randint(1, 120), None
        else:
            yield kind, tokens, namespace


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru"])
@pytest.mark.parametrize("stock", ["python", "rust"])
@pytest.mark.parametrize("seed", range(10))
def test_tree_evicts_the_same_victims_in_the_same_order_as_sglang(
    seed: int, stock: str, policy: str
) -> None:
    """The free lists of two allocators, fed by the same operations, stay equal slot by slot."""
    ours, theirs = Cache("elora", NUM_SLOTS, policy), Cache(stock, NUM_SLOTS, policy)
    locks: list[tuple[Any, Any]] = []
    evictions = 0
    for kind, argument, namespace in history(seed):
        if kind == "insert":
            if not ours.insert(argument, namespace):
                needed = len(argument)
                assert ours.evict(needed) == theirs.evict(needed)
                evictions += 1
                inserted = ours.insert(argument, namespace)
                assert theirs.insert(argument, namespace) == inserted
            else:
                assert theirs.insert(argument, namespace)
        elif kind == "evict":
            assert ours.evict(argument) == theirs.evict(argument)
            evictions += 1
        elif kind == "match":
            found = [(cache, cache.match(argument, namespace)) for cache in (ours, theirs)]
            mine, other = (cache.slots(match, namespace).tolist() for cache, match in found)
            assert mine == other
            assert {match.device_prefix_len for _, match in found} == {len(mine)}
        elif kind == "lock":
            held = []
            for cache in (ours, theirs):
                node = cache.match(argument, namespace).last_device_node
                held.append((node, cache.lock(node)))
            locks.append((held[0], held[1]))
        elif kind == "unlock" and locks:
            for cache, (node, receipt) in zip((ours, theirs), locks.pop(0), strict=True):
                cache.unlock(node, receipt)
        elif kind == "reset" and not locks:
            for cache in (ours, theirs):
                cache.tree.reset()
                cache.allocator.clear()
        assert ours.free_slots() == theirs.free_slots()
        check(ours)
    assert evictions > 10


def test_unevictable_leaf_is_tried_once_per_eviction() -> None:
    """A leaf may need a host copy that fails; it is not tried again in the same eviction."""
    cache = Cache("elora", 100)
    cache.insert(range(10))
    core = cache.tree.tree_core
    component = core.components_by_type[sglang().ComponentType.FULL]
    core.is_write_back = True
    component.evict_device_start(5)
    tracker = {sglang().ComponentType.FULL: 0}
    assert component.evict_device_next_node(tracker, {}, {}, []) is not None
    assert component.evict_device_next_node(tracker, {}, {}, []) is None
    component.evict_device_end()
    core.is_write_back = False
    check(cache)
    assert cache.evict(5) == 10


@pytest.mark.parametrize("policy", ["mru", "filo", "priority"])
def test_policies_without_an_order_keep_sglangs_scan(policy: str) -> None:
    ours, theirs = Cache("elora", 300, policy), Cache("python", 300, policy)
    for cache in (ours, theirs):
        for i in range(20):
            cache.insert([i, *range(8)])
        cache.match([5, *range(8)])
        assert cache.evict(60) >= 60
    assert not isinstance(ours.tree.tree_core.evictable_device_leaves, EvictionOrder)
    assert ours.free_slots() == theirs.free_slots()


@pytest.mark.parametrize(
    ("special", "named"),
    [
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"is_hybrid_swa": True}, "sliding windows"),
        ({"is_hybrid_ssm": True}, "state spaces"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"enable_flexkv": True}, "--enable-flexkv"),
        ({}, None),
    ],
)
def test_special_cache_kinds_use_sglangs_tree(
    special: dict[str, bool],
    named: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sglang()
    from sglang_elora.srt.scheduler import assembly

    flags = {"disable_radix_cache", "is_hybrid_swa", "is_hybrid_ssm"}
    settings = dict.fromkeys({*flags, "enable_lmcache", "enable_flexkv"}, False) | special
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=None))
    ctx = SimpleNamespace(params=SimpleNamespace(), tp_worker=worker, **settings)
    monkeypatch.setattr(assembly, "get_memory", lambda: ctx)
    monkeypatch.setattr(assembly, "default_radix_cache_factory", lambda ctx: "SGLang's")
    monkeypatch.setattr(assembly, "create_unified_radix_cache", lambda ctx, **_: "ours")
    assert assembly.create_cache(ctx) == ("ours" if named is None else "SGLang's")
    assert (named or "") in caplog.text
    assert hasattr(ctx.params, "tree_core_backend") == (named is None)


def test_eviction_asks_priorities_of_few_leaves() -> None:
    """Counted, not timed: priorities computed while 5 of 2,000 leaves are evicted."""
    cache = Cache("elora", 30_000)
    for i in range(2_000):
        cache.insert([i, *range(10)])
    strategy = cache.tree.tree_core.eviction_strategy
    asked = []
    leaves = cache.tree.tree_core.evictable_device_leaves
    leaves._priority = lambda node: asked.append(node) or strategy.get_priority(node)
    assert cache.evict(50) == 55
    assert len(asked) < 30
