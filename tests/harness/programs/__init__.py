"""Programs that tests run in processes of their own."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def source(name: str) -> str:
    """The text of a program, for ``python -c``."""
    return path(name).read_text()
