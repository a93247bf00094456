"""What is known of adapters: names in namespaces, counts, and what survives a reset."""

from __future__ import annotations

import pytest

from sglang_elora.tree import AdapterForest, adapter_of, namespace_of


@pytest.mark.parametrize(
    ("namespace", "uid"),
    [
        (None, None),
        ("base/", None),
        ("base/lora/a/", None),
        ("lora/a/", "a"),
        ("lora/a/extra", "a"),
        ("lora/a/base/b/lora/c/", "a"),
    ],
)
def test_adapter_of(namespace: str | None, uid: str | None) -> None:
    assert adapter_of(namespace) == uid


def test_namespace_of() -> None:
    assert namespace_of("a") == "lora/a/"
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
