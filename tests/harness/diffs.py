"""Diffs as the tests of patches write them."""

from __future__ import annotations

from difflib import unified_diff


def unified(target: str, before: str, after: str) -> str:
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(unified_diff(*lines, f"a/{target}", f"b/{target}"))
