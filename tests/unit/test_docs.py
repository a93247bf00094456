"""What the documentation says about the code is what the code says."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FILE = re.compile(r"(?<![\w/.*-])(?:[\w.*-]+/)*[\w*-]+\.(?:py|md|sh|patch)\b")
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


def folders_of(name: str, page: Path) -> Iterator[Path]:
    """Where a file may be that a page names: tests are also named without their folder."""
    package = ROOT / "python" / "sglang_elora"
    yield from (page.parent, ROOT, package, package / "srt")
    if name.startswith("test_"):
        yield from (folder for folder in (ROOT / "tests").iterdir() if folder.is_dir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = {name for name in FILE.findall(page.read_text()) if not name.startswith("sglang/")}
    missing = [
        name for name in names if not any(any(at.glob(name)) for at in folders_of(name, page))
    ]
    assert sorted(missing) == []


def test_files_of_sglang_that_pages_name_exist() -> None:
    spec = find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("needs SGLang's files")
    names = {name for page in PAGES for name in FILE.findall(page.read_text())}
    of_sglang = sorted(name for name in names if name.startswith("sglang/"))
    assert of_sglang
    installed = Path(spec.origin).parents[1]
    assert [name for name in of_sglang if not any(installed.glob(name))] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "patches/README.md"], ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"def (test_\w+)\(", path.read_text()))
    assert sorted(set(re.findall(r"\btest_[a-z0-9_]+", page.read_text())) - known) == []
