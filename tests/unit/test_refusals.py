"""A broken adapter is read once, and again when its files have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_elora.adapters import AdapterError, Refusals
from sglang_elora.adapters.refusals import MOST


class Checked:
    """A check that refuses until the test switches it off, and counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_good = False

    def __call__(self) -> str:
        self.num_calls += 1
        if self.is_good:
            return "facts"
        raise AdapterError("first", "adapter/file", "it is broken", "Mend it")


def test_refused_folder_is_not_checked_again_until_it_changes(tmp_path: Path) -> None:
    refusals, check = Refusals(), Checked()
    (tmp_path / "weights").write_text("broken")
    for name in ("first", "second", "third"):
        with pytest.raises(AdapterError, match=rf"'{name}' \(adapter/file\): it is broken. Mend"):
            refusals.check(name, str(tmp_path), check)
    assert check.num_calls == 1
    (tmp_path / "weights").write_text("mended")
    os.utime(tmp_path / "weights", ns=(1, 1))
    check.is_good = True
    assert refusals.check("first", str(tmp_path), check) == "facts"
    assert refusals.check("first", str(tmp_path), check) == "facts"
    assert check.num_calls == 3, "what is good is looked at each time"


def test_refused_hub_id_is_checked_each_time(tmp_path: Path) -> None:
    refusals, check = Refusals(), Checked()
    for _ in range(2):
        with pytest.raises(AdapterError):
            refusals.check("first", "acme/sql", check)
    assert check.num_calls == 2


def test_number_of_remembered_refusals_is_bounded(tmp_path: Path) -> None:
    refusals, check = Refusals(), Checked()
    folders = [tmp_path / str(i) for i in range(MOST + 1)]
    for folder in folders:
        folder.mkdir()
        (folder / "weights").touch()
        with pytest.raises(AdapterError):
            refusals.check("first", str(folder), check)
    for folder in (folders[-1], folders[0]):
        with pytest.raises(AdapterError):
            refusals.check("first", str(folder), check)
    assert check.num_calls == MOST + 2, "the first was forgotten, the last was not"


def test_os_errors_are_not_remembered_as_refusals(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    refusals = Refusals()

    def fail() -> str:
        raise AdapterError("first", "adapter", "cannot read it", "Copy it") from OSError("EMFILE")

    with pytest.raises(AdapterError):
        refusals.check("first", str(tmp_path), fail)
    assert refusals.check("first", str(tmp_path), lambda: "facts") == "facts"
