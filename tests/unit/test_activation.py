"""Where an activated LoRA begins to act."""

from __future__ import annotations

import random

import pytest

from sglang_elora.tree import (
    ActivatedAdapter,
    ActivatedNamespace,
    adapter_of,
    base_namespace,
    is_activated,
    last_occurrence,
    namespace_of,
    num_inactive,
)


@pytest.mark.parametrize(
    ("tokens", "sought", "at"),
    [
        ([1, 2, 3], [2], 1),
        ([1, 2, 3], [1, 2, 3], 0),
        ([2, 2, 2], [2, 2], 1),
        ([5, 6, 5, 6, 5], [5, 6], 2),
        ([1, 2], [1, 2, 3], None),
        ([], [1], None),
        ([256, 1], [1, 0], None),
        ([1, 256], [256], 1),
    ],
)
def test_last_occurrence_of_tokens(tokens: list[int], sought: list[int], at: int | None) -> None:
    assert last_occurrence(tokens, sought) == at


def test_last_occurrence_is_that_of_a_scan() -> None:
    """Tokens whose bytes repeat: an occurrence of the bytes need not be one of the tokens."""
    rng = random.Random(0)
    alphabet = [0, 1, 256, 1 << 8 | 1, 1 << 56]
    for _ in range(2_000):
        tokens = rng.choices(alphabet, k=rng.randrange(12))
        sought = rng.choices(alphabet, k=rng.randrange(1, 4))
        places = [i for i in range(len(tokens)) if tokens[i : i + len(sought)] == sought]
        assert last_occurrence(tokens, sought) == (places[-1] if places else None)


def test_namespaces_of_activated_adapters_are_their_own() -> None:
    """Adapter, extra key and place within a page tell them apart, also from plain ones."""
    names = {
        (adapter, extra, start): ActivatedNamespace.of(adapter, extra, None, start, page_size=4)
        for adapter in ("a", "b")
        for extra in ("", "x", "alora/1/", "a")
        for start in (8, 9, 10, 11)
    }
    others = [namespace_of("a"), namespace_of("a", "x"), base_namespace("alora/0//a"), None]
    assert len({*names.values(), *others}) == len(names) + len(others)
    for (adapter, _, _), name in names.items():
        assert adapter_of(name) == adapter and is_activated(name) and name.start == 8
    assert [adapter_of(other) for other in others] == ["a", "a", None, None]
    assert not any(map(is_activated, others))


@pytest.mark.parametrize(
    ("first", "num_rows", "inactive"),
    [(0, 20, 10), (0, 5, 5), (4, 6, 6), (4, 8, 6), (10, 3, 0), (50, 1, 0), (0, 0, 0)],
)
def test_rows_before_the_start_have_no_adapter(first: int, num_rows: int, inactive: int) -> None:
    assert num_inactive(ActivatedAdapter.of("a", 10), first, num_rows) == inactive
    assert num_inactive("a", first, num_rows) == num_inactive(None, first, num_rows) == 0
