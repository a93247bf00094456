"""What is known of adapters: names in namespaces, counts, and what survives a reset."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_elora.tree import Adapter, AdapterForest, adapter_of, namespace_of


@pytest.mark.parametrize(
    ("namespace", "uid"),
    [
        (None, None),
        ("base/x/", None),
        ("base/lora//a/", None),
        ("lora//a", "a"),
        ("lora/extra/a", "a"),
        ("lora/base/b/lora//c/a", "a"),
    ],
)
def test_adapter_of(namespace: str | None, uid: str | None) -> None:
    assert adapter_of(namespace) == uid


def test_namespace_of() -> None:
    assert namespace_of("a") == "lora//a"
    assert adapter_of(namespace_of("a", "x/y")) == "a"


def test_register_and_get() -> None:
    forest = AdapterForest()
    adapter = forest.register("a", num_slots=5, pinned=True, version="v")
    assert forest.get("a") is adapter and "a" in forest and list(forest) == [adapter]
    assert forest.get(None) is forest.base and forest.base.resident
    assert len(forest) == 1  # the base model is not one of them
    with pytest.raises(AssertionError, match="registered"):
        forest.register("a", num_slots=5, pinned=False, version="v")


def test_kv_of_an_unknown_adapter_is_of_a_retired_one() -> None:
    forest = AdapterForest()
    assert forest.get("gone").retired
    assert forest.get("gone") is forest.get("gone")


def test_only_an_empty_adapter_is_removed() -> None:
    forest = AdapterForest()
    adapter = forest.register("a", num_slots=5, pinned=False, version="v")
    forest.count_kv(adapter, device=1, host=0)
    forest.retire("a")
    assert forest.retired == (adapter,)
    with pytest.raises(AssertionError):
        forest.remove("a")


def test_slots() -> None:
    forest = AdapterForest()
    forest.register("a", num_slots=5, pinned=True, version="v")
    forest.set_resident(forest.register("b", num_slots=7, pinned=False, version="v"), True)
    assert (forest.pinned_slots, forest.resident_slots, forest.num_resident) == (5, 7, 1)
    forest.check_invariants()
    forest.retire("a")
    forest.remove("a")
    assert forest.pinned_slots == 0 and "a" not in forest and forest.retired == ()
    forest.set_resident(forest.get("b"), False)
    assert (forest.resident_slots, forest.num_resident) == (0, 0)


def test_pins_are_counted_once() -> None:
    forest = AdapterForest()
    adapter = forest.register("a", num_slots=5, pinned=False, version="v")
    for _ in range(2):
        forest.pin(adapter)
        assert adapter.pinned and forest.pinned_slots == 5
    for _ in range(2):
        forest.unpin(adapter)
        assert not adapter.pinned and forest.pinned_slots == 0
    forest.check_invariants()


def test_what_changed_is_told_once_and_in_order() -> None:
    forest = AdapterForest()
    a = forest.register("a", num_slots=5, pinned=False, version="v")
    forest.register("b", num_slots=7, pinned=False, version="v")
    assert forest.changed_since(0) == [("a", 1), ("b", 2)]
    assert forest.changed_since(1) == [("b", 2)]
    forest.count_kv(a, device=3, host=0)
    forest.count_kv(forest.base, device=3, host=0)
    assert forest.changed_since(0) == [("b", 2), ("a", 3)]
    assert forest.changed_since(forest.num_changes) == []
    forest.retire("b")
    forest.remove("b")
    assert [uid for uid, _ in forest.changed_since(0)] == ["a"]


def test_reset_keeps_adapters_and_drops_what_they_hold() -> None:
    forest = AdapterForest()
    adapter = forest.register("a", num_slots=5, pinned=False, version="v")
    forest.set_resident(adapter, True)
    forest.count_kv(adapter, device=8, host=9)
    forest.count_kv(forest.base, device=3, host=0)
    assert (forest.device_tokens, forest.host_tokens) == (11, 9)
    forest.get("gone")
    forest.clear_tree()
    assert list(forest) == [adapter]
    assert (adapter.resident, adapter.device_tokens, adapter.host_tokens) == (False, 0, 0)
    assert forest.base.device_tokens == forest.device_tokens == forest.host_tokens == 0
    forest.check_invariants()


def test_kv_without_its_adapter_is_invalid() -> None:
    adapter = AdapterForest().register("a", num_slots=5, pinned=False, version="v")
    adapter.device_tokens = 8
    assert adapter.invalid_tokens == 8
    adapter.resident = True
    assert adapter.invalid_tokens == 0


class CountedAdapters(dict[str, Adapter]):
    """Counts the adapters that somebody looks at one after the other."""

    num_seen = 0

    def values(self) -> Any:
        for adapter in super().values():
            self.num_seen += 1
            yield adapter


def test_sums_and_the_largest_unpinned_adapter_are_found_without_a_look_at_all_adapters() -> None:
    forest = AdapterForest()
    for i in range(2000):
        forest.register(str(i), num_slots=[8, 16, 32][i % 3], pinned=i % 5 == 0, version="v")
    only = forest.register("only", num_slots=64, pinned=False, version="v")
    forest._adapters = adapters = CountedAdapters(forest._adapters)
    assert forest.largest_unpinned() == 64
    assert forest.largest_unpinned(without="only") == 32
    forest.pin(only)
    assert forest.largest_unpinned() == forest.largest_unpinned(without="only") == 32
    forest.unpin(only)
    forest.retire("only")
    forest.remove("only")
    assert forest.largest_unpinned() == 32
    forest.count_kv(forest.get("1"), device=7, host=0)
    assert forest.invalid_tokens == 7  # nobody has loaded it
    forest.set_resident(forest.get("1"), True)
    assert forest.invalid_tokens == 0
    assert adapters.num_seen == 0
    forest.check_invariants()


def test_retired_adapters_are_returned_in_turns_and_told_of_when_they_are_removed() -> None:
    forest, removed = AdapterForest(), []
    forest.on_removed = removed.append
    assert forest.next_retired() is None
    for name in "abc":
        forest.register(name, num_slots=5, pinned=False, version="v")
    forest.retire("a")
    forest.retire("c")
    turns = [forest.next_retired() for _ in range(4)]
    assert [adapter.uid for adapter in turns if adapter is not None] == ["a", "c", "a", "c"]
    forest.remove("a")
    assert removed == ["a"] and forest.num_retired == 1
    forest.clear_tree()
    assert removed == ["a", "c"] and forest.next_retired() is None
