"""Plain text tables for files and pipes, never wrapped or cut at the width of a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich import box
from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 10_000  # wider than any table, since rich wraps cells of a table that does not fit


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text table without rules; the first column is left-aligned, the others right-aligned."""
    return _rendered(head, rows, None)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same table in Markdown."""
    return _rendered(head, rows, box.MARKDOWN)


def _rendered(head: Sequence[str], rows: Iterable[Sequence[str]], lines: Box | None) -> str:
    padding = (0, 1) if lines else (0, 2, 0, 0)
    table = Table(box=lines, pad_edge=lines is not None, padding=padding, show_edge=True)
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    out = StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
