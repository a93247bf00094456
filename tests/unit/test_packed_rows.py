"""The archive of raw rows depends on its contents only; git tracks none of its rows."""

from __future__ import annotations

import gzip
import runpy
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/results/rows.py"))
CONTENT = {"b/2.json.gz": gzip.compress(b"[1]", mtime=0), "a/1.jsonl": b"{}\n", "a/0.json": b"[]"}


def test_packed_rows_archive_is_deterministic_and_round_trips(tmp_path: Path) -> None:
    one, other = tmp_path / "one.tar.xz", tmp_path / "other.tar.xz"
    ROWS["write"](CONTENT, one)
    ROWS["write"](dict(reversed(CONTENT.items())), other)
    assert one.read_bytes() == other.read_bytes()
    assert ROWS["read"](one) == CONTENT


def test_pack_includes_rows_but_not_tables(tmp_path: Path) -> None:
    for name, content in (CONTENT | dict.fromkeys([*ROWS["TABLES"], "a/README.md"], b"")).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert ROWS["lying"](tmp_path) == CONTENT


def test_pack_selects_rows_by_folder_and_refuses_an_empty_one() -> None:
    assert ROWS["chosen"](CONTENT, []) == CONTENT
    assert set(ROWS["chosen"](CONTENT, ["a/"])) == {"a/1.jsonl", "a/0.json"}
    with pytest.raises(SystemExit, match="no rows of c/"):
        ROWS["chosen"](CONTENT, ["a", "c"])


def test_no_packed_row_is_tracked_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "benchmarks/results"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.removeprefix("benchmarks/results/") for line in result.stdout.splitlines()}
    with tarfile.open(ROWS["ARCHIVE"]) as tar:
        packed = set(tar.getnames())
    assert packed and not packed & names
    assert {name for name in names if name.endswith(ROWS["SUFFIXES"])} == set(ROWS["TABLES"])
