"""Adapters in the tree: KV is on the device only with its adapter, and every slot has one owner."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_elora.tree import namespace_of
from tests.harness.adapter_cache import AdapterCache
from tests.harness.radix_cache import sglang


def test_adapter_is_evicted_after_its_kv() -> None:
    cache = AdapterCache(100)
    cache.add("a", 20)
    assert cache.load("a") and cache.chat(range(30), "a")
    assert cache.evict(1) == 30  # the leaf, not the adapter, which is older
    assert cache.left == []
    assert cache.evict(1) == 20
    assert cache.left == ["a"]
    cache.check()


def test_one_eviction_removes_kv_then_its_adapter() -> None:
    cache = AdapterCache(100)
    cache.add("a", 20)
    cache.load("a")
    cache.chat(range(30), "a")
    assert cache.evict(50) == 50
    assert cache.left == ["a"]
    assert cache.allocator.available_size() == 100
    cache.check()


def test_unused_adapter_is_evicted_before_younger_kv_of_others() -> None:
    cache = AdapterCache(100)
    cache.add("a", 20)
    cache.load("a")
    cache.chat(range(30), None)
    assert cache.evict(1) == 20
    assert cache.left == ["a"]
    assert cache.match(range(30)).device_prefix_len == 30


@pytest.mark.parametrize("tokens", [(), range(30)])
def test_request_without_cached_kv_locks_its_adapter(tokens: Sequence[int]) -> None:
    """A request locks the node at the end of its match, below the adapter, even without KV."""
    cache = AdapterCache(100)
    cache.add("a", 20)
    cache.load("a")
    node = cache.match(tokens, namespace_of("a")).last_device_node
    assert cache.tree.is_root(node) and node == cache.tree.root_node_handle(namespace_of("a"))
    receipt = cache.lock(node)
    assert cache.evict(100) == 0 and cache.tree.evictable_size() == 0
    cache.check()
    cache.unlock(node, receipt)
    assert cache.evict(100) == 20


def test_adapter_loaded_under_a_lock_is_protected() -> None:
    cache = AdapterCache(100)
    cache.add("a", 20)
    node = cache.match(range(5), namespace_of("a")).last_device_node
    receipt = cache.lock(node)
    cache.load("a")
    assert cache.core.protected_size() == 20
    cache.check()
    cache.unlock(node, receipt)
    assert cache.core.protected_size() == 0
    cache.check()


def test_pinned_adapter_is_not_evicted_until_unloaded() -> None:
    cache = AdapterCache(100)
    cache.add("a", 20, pinned=True)
    cache.load("a")
    cache.chat(range(30), "a")
    assert cache.evict(100) == 30
    cache.check()
    cache.unload("a")
    cache.check()
    assert cache.left == ["a"] and cache.allocator.available_size() == 100


def test_same_tokens_under_two_adapters_share_no_kv() -> None:
    cache = AdapterCache()
    for adapter_id in ("a", "b"):
        cache.add(adapter_id, 20)
        cache.load(adapter_id)
    cache.chat(range(30), "a")
    assert cache.match(range(30), namespace_of("b")).device_prefix_len == 0
    assert cache.match(range(30)).device_prefix_len == 0
    assert cache.match(range(30), namespace_of("a", "salt")).device_prefix_len == 0
    assert cache.match(range(30), namespace_of("a")).device_prefix_len == 30


def test_extra_keys_share_the_adapter() -> None:
    cache = AdapterCache()
    cache.add("a", 20)
    cache.load("a")
    for salt in ("x", "y"):
        cache.insert(range(30), namespace_of("a", salt))
    assert cache.adapter_table.get("a").device_tokens == 60
    cache.unload("a")
    assert cache.allocator.available_size() == 400
    cache.check()


def test_unload_frees_unlocked_kv_and_purges_the_rest_later() -> None:
    cache = AdapterCache()
    cache.add("a", 20)
    cache.load("a")
    cache.chat(range(30), "a")
    cache.chat([*range(10), *range(100, 120)], "a")
    node = cache.match(range(10), namespace_of("a")).last_device_node
    receipt = cache.lock(node)
    cache.unload("a")
    assert "a" in cache.adapter_table and cache.adapter_table.get("a").device_tokens == 10
    cache.check()
    cache.unlock(node, receipt)
    assert cache.purge("a") and "a" not in cache.adapter_table
    assert cache.left == ["a"] and cache.allocator.available_size() == 400
    cache.check()


def test_kv_inserted_after_unload_is_purged() -> None:
    cache = AdapterCache()
    cache.insert(range(30), namespace_of("gone"))
    assert cache.adapter_table.get("gone").retired
    cache.check()
    assert cache.purge("gone")
    cache.check()


def test_reset_drops_slots_and_kv_but_keeps_adapters() -> None:
    cache = AdapterCache()
    cache.add("a", 20)
    cache.add("b", 20, pinned=True)
    for adapter_id in ("a", "b"):
        cache.load(adapter_id)
        cache.chat(range(30), adapter_id)
    cache.tree.reset()
    cache.allocator.clear()
    cache.check()
    assert cache.left == ["a", "b"]
    assert [(a.adapter_id, a.resident, a.device_tokens) for a in cache.adapter_table] == [
        ("a", False, 0),
        ("b", False, 0),
    ]
    assert cache.load("b") and cache.chat(range(30), "b")
    cache.check()


def test_adapter_of_zero_slots_is_never_evicted() -> None:
    cache = AdapterCache()
    cache.add("a", 0)
    cache.load("a")
    cache.chat(range(30), "a")
    assert cache.evict(400) == 30 and cache.left == []
    cache.check()


def test_invariant_check_finds_kv_without_its_adapter() -> None:
    cache = AdapterCache()
    cache.add("a", 20)
    cache.insert(range(30), namespace_of("a"))  # its adapter was not loaded
    with pytest.raises(AssertionError, match="without its adapter"):
        cache.check()


def test_invariant_check_finds_a_wrong_token_count() -> None:
    cache = AdapterCache()
    cache.insert(range(30))
    cache.adapter_table.count_kv(cache.adapter_table.base, device=-1, host=0)
    with pytest.raises(AssertionError, match="holds \\[30, 0\\] tokens"):
        cache.check()


def test_invariant_check_finds_a_wrong_sum() -> None:
    cache = AdapterCache()
    cache.insert(range(30))
    cache.adapter_table.device_tokens -= 1
    with pytest.raises(AssertionError, match="'device_tokens': 29"):
        cache.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "priority"])
@pytest.mark.parametrize("seed", range(8))
def test_adapter_tree_counts_stay_exact_over_random_histories(seed: int, policy: str) -> None:
    """Adapters are loaded, locked, evicted, unloaded and reset at random; all counts stay exact."""
    rng = random.Random(seed)
    cache = AdapterCache(policy=policy)
    locks: list[tuple[Any, Any]] = []
    serial = 0
    names: list[str] = []
    paths: list[tuple[tuple[int, ...], str | None]] = [((1,), None)]
    seen: Counter[str] = Counter()
    for _ in range(300):
        kind = rng.choices(
            ["chat", "lock", "unlock", "evict", "add", "unload", "reset"],
            weights=[50, 12, 12, 10, 6, 4, 0.5],
        )[0]
        tokens, adapter_id = rng.choice(paths[-20:])
        if adapter_id is not None and adapter_id not in names:
            continue
        if kind == "add":
            serial += 1
            names.append(f"a{serial}")
            cache.add(names[-1], rng.randint(0, 60), pinned=rng.random() < 0.1 and serial < 3)
            paths.append(((), names[-1]))
        elif kind == "chat":
            tokens += tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 30)))
            if (adapter_id is None or cache.load(adapter_id)) and cache.chat(tokens, adapter_id):
                paths.append((tokens, adapter_id))
                seen["chat"] += 1
        elif kind == "lock" and (adapter_id is None or cache.load(adapter_id)):
            namespace = None if adapter_id is None else namespace_of(adapter_id)
            node = cache.match(tokens, namespace).last_device_node
            locks.append((node, cache.lock(node)))
        elif kind == "unlock" and locks:
            cache.unlock(*locks.pop(rng.randrange(len(locks))))
        elif kind == "evict":
            cache.evict(rng.randint(1, 150))
        elif kind == "unload" and adapter_id is not None:
            names.remove(adapter_id)
            cache.unload(adapter_id)
            seen["unload"] += 1
        elif kind == "reset" and not locks:
            cache.tree.reset()
            cache.allocator.clear()
        for adapter in cache.adapter_table.retired:
            cache.purge(str(adapter.adapter_id))
        cache.check()
    for lock in locks:
        cache.unlock(*lock)
    assert seen["chat"] > 40 and seen["unload"] > 0 and cache.left


def test_harness_uses_the_server_tree_class() -> None:
    from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore

    assert sglang() and type(AdapterCache().core) is EloraTreeCore
