"""What the documentation says about the code is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLES: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "tables.py"))


@pytest.mark.parametrize("name", ["flags", "metrics"])
def test_generated_table_is_up_to_date(name: str) -> None:
    assert TABLES["outdated"]([name]) == [], f"run {TABLES['COMMAND']}"


def test_a_table_replaces_what_is_between_its_markers_only() -> None:
    begin, end = "<!-- begin generated: a -->\n", "<!-- end generated: a -->\n"
    page = f"before\n{begin}old\n{end}after\n"
    assert TABLES["with_table"](page, "a", ["new"]) == page.replace("old", "new")


@pytest.mark.parametrize("page", ["", "<!-- begin generated: a -->\n"])
def test_a_page_without_markers_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="begin generated: a"):
        TABLES["with_table"](page, "a", [])
