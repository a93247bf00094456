"""Adapter moves are reported when an adapter changes its tier, not when it is used."""

from __future__ import annotations

from sglang_elora.control.events import Moves


def test_adapter_moves_report_only_changed_tiers() -> None:
    moves, loaded = Moves(), {"a": "law", "b": "art"}
    assert moves.of([("a", "law", "disk"), ("b", "art", "disk")], loaded) == [
        ("a", "law", "disk"),
        ("b", "art", "disk"),
    ]
    assert moves.of([("a", "law", "host"), ("b", "art", "disk")], loaded) == [("a", "law", "host")]


def test_adapter_moves_report_an_unload_once() -> None:
    moves = Moves()
    moves.of([("a", "law", "device"), ("b", "art", "host")], {"a": "law", "b": "art"})
    assert moves.of([], {"b": "art"}) == [("a", "law", "unloaded")]
    assert moves.of([], {"b": "art"}) == []


def test_adapter_moves_treat_a_reloaded_name_as_a_new_adapter() -> None:
    moves = Moves()
    moves.of([("a", "law", "device")], {"a": "law"})
    told = moves.of([("c", "law", "disk")], {"c": "law"})
    assert told == [("a", "law", "unloaded"), ("c", "law", "disk")]
