"""Rules for adapter names: they go into terminals, logs, metric labels and JSON."""

from __future__ import annotations

MAX_NAME_CHARS = 256
"""Longest accepted adapter name, in characters."""


def name_problem(name: str) -> str:
    """Why this name is invalid for an adapter, or an empty text."""
    if not name or len(name) > MAX_NAME_CHARS:
        return f"a name has 1 to {MAX_NAME_CHARS} characters, this one {len(name)}"
    if not name.isprintable():
        return "its name has characters that cannot be printed"
    if name != name.strip():
        return "its name begins or ends with a space"
    return ""
