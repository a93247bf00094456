"""The adapter table: ids in namespaces, counts, and state that survives a reset."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_elora.tree import Adapter, AdapterTable, adapter_of, namespace_of


@pytest.mark.parametrize(
    ("namespace", "adapter_id"),
    [
        (None, None),
        ("base/x/", None),
        ("base/lora//a/", None),
        ("lora//a", "a"),
        ("lora/extra/a", "a"),
        ("lora/base/b/lora//c/a", "a"),
    ],
)
def test_adapter_of(namespace: str | None, adapter_id: str | None) -> None:
    assert adapter_of(namespace) == adapter_id


def test_namespace_of() -> None:
    assert namespace_of("a") == "lora//a"
    assert adapter_of(namespace_of("a", "x/y")) == "a"


def test_register_and_get() -> None:
    adapter_table = AdapterTable()
    adapter = adapter_table.register("a", num_slots=5, pinned=True, version="v")
    assert (
        adapter_table.get("a") is adapter
        and "a" in adapter_table
        and list(adapter_table) == [adapter]
    )
    assert adapter_table.get(None) is adapter_table.base and adapter_table.base.resident
    assert len(adapter_table) == 1  # the base model is not one of them
    with pytest.raises(AssertionError, match="registered"):
        adapter_table.register("a", num_slots=5, pinned=False, version="v")


def test_unknown_adapter_id_is_registered_as_retired() -> None:
    adapter_table = AdapterTable()
    assert adapter_table.get("gone").retired
    assert adapter_table.get("gone") is adapter_table.get("gone")


def test_only_an_adapter_without_kv_is_removed() -> None:
    adapter_table = AdapterTable()
    adapter = adapter_table.register("a", num_slots=5, pinned=False, version="v")
    adapter_table.count_kv(adapter, device=1, host=0)
    adapter_table.retire("a")
    assert adapter_table.retired == (adapter,)
    with pytest.raises(AssertionError):
        adapter_table.remove("a")


def test_adapter_table_sums_pinned_and_resident_slots() -> None:
    adapter_table = AdapterTable()
    adapter_table.register("a", num_slots=5, pinned=True, version="v")
    adapter_table.set_resident(
        adapter_table.register("b", num_slots=7, pinned=False, version="v"), True
    )
    assert (
        adapter_table.pinned_slots,
        adapter_table.resident_slots,
        adapter_table.num_resident,
    ) == (5, 7, 1)
    adapter_table.check_invariants()
    adapter_table.retire("a")
    adapter_table.remove("a")
    assert (
        adapter_table.pinned_slots == 0 and "a" not in adapter_table and adapter_table.retired == ()
    )
    adapter_table.set_resident(adapter_table.get("b"), False)
    assert (adapter_table.resident_slots, adapter_table.num_resident) == (0, 0)


def test_pinning_twice_counts_slots_once() -> None:
    adapter_table = AdapterTable()
    adapter = adapter_table.register("a", num_slots=5, pinned=False, version="v")
    for _ in range(2):
        adapter_table.pin(adapter)
        assert adapter.pinned and adapter_table.pinned_slots == 5
    for _ in range(2):
        adapter_table.unpin(adapter)
        assert not adapter.pinned and adapter_table.pinned_slots == 0
    adapter_table.check_invariants()


def test_changed_since_lists_each_change_once_in_order() -> None:
    adapter_table = AdapterTable()
    a = adapter_table.register("a", num_slots=5, pinned=False, version="v")
    adapter_table.register("b", num_slots=7, pinned=False, version="v")
    assert adapter_table.changed_since(0) == [("a", 1), ("b", 2)]
    assert adapter_table.changed_since(1) == [("b", 2)]
    adapter_table.count_kv(a, device=3, host=0)
    adapter_table.count_kv(adapter_table.base, device=3, host=0)
    assert adapter_table.changed_since(0) == [("b", 2), ("a", 3)]
    assert adapter_table.changed_since(adapter_table.num_changes) == []
    adapter_table.retire("b")
    adapter_table.remove("b")
    assert [adapter_id for adapter_id, _ in adapter_table.changed_since(0)] == ["a"]


def test_reset_keeps_adapters_and_drops_their_slots_and_kv() -> None:
    adapter_table = AdapterTable()
    adapter = adapter_table.register("a", num_slots=5, pinned=False, version="v")
    adapter_table.set_resident(adapter, True)
    adapter_table.count_kv(adapter, device=8, host=9)
    adapter_table.count_kv(adapter_table.base, device=3, host=0)
    assert (adapter_table.device_tokens, adapter_table.host_tokens) == (11, 9)
    adapter_table.get("gone")
    adapter_table.clear_tree()
    assert list(adapter_table) == [adapter]
    assert (adapter.resident, adapter.device_tokens, adapter.host_tokens) == (False, 0, 0)
    assert (
        adapter_table.base.device_tokens
        == adapter_table.device_tokens
        == adapter_table.host_tokens
        == 0
    )
    adapter_table.check_invariants()


def test_kv_tokens_of_a_nonresident_adapter_are_invalid() -> None:
    adapter = AdapterTable().register("a", num_slots=5, pinned=False, version="v")
    adapter.device_tokens = 8
    assert adapter.invalid_tokens == 8
    adapter.resident = True
    assert adapter.invalid_tokens == 0


class CountedAdapters(dict[str, Adapter]):
    """Counts the adapters visited by iteration."""

    num_seen = 0

    def values(self) -> Any:
        for adapter in super().values():
            self.num_seen += 1
            yield adapter


def test_adapter_table_sums_need_no_scan_of_all_adapters() -> None:
    adapter_table = AdapterTable()
    for i in range(2000):
        adapter_table.register(str(i), num_slots=[8, 16, 32][i % 3], pinned=i % 5 == 0, version="v")
    only = adapter_table.register("only", num_slots=64, pinned=False, version="v")
    adapter_table._adapters = adapters = CountedAdapters(adapter_table._adapters)
    assert adapter_table.largest_unpinned() == 64
    assert adapter_table.largest_unpinned(without="only") == 32
    adapter_table.pin(only)
    assert adapter_table.largest_unpinned() == adapter_table.largest_unpinned(without="only") == 32
    adapter_table.unpin(only)
    adapter_table.retire("only")
    adapter_table.remove("only")
    assert adapter_table.largest_unpinned() == 32
    adapter_table.count_kv(adapter_table.get("1"), device=7, host=0)
    assert adapter_table.invalid_tokens == 7  # not loaded
    adapter_table.set_resident(adapter_table.get("1"), True)
    assert adapter_table.invalid_tokens == 0
    assert adapters.num_seen == 0
    adapter_table.check_invariants()


def test_next_retired_rotates_and_removal_calls_on_removed() -> None:
    adapter_table, removed = AdapterTable(), []
    adapter_table.on_removed = removed.append
    assert adapter_table.next_retired() is None
    for name in "abc":
        adapter_table.register(name, num_slots=5, pinned=False, version="v")
    adapter_table.retire("a")
    adapter_table.retire("c")
    turns = [adapter_table.next_retired() for _ in range(4)]
    assert [adapter.adapter_id for adapter in turns if adapter is not None] == ["a", "c", "a", "c"]
    adapter_table.remove("a")
    assert removed == ["a"] and adapter_table.num_retired == 1
    adapter_table.clear_tree()
    assert removed == ["a", "c"] and adapter_table.next_retired() is None
