"""A watched folder: what is new is found once, when it is whole, and only if it lies inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_elora.adapters import FolderScan
from sglang_elora.adapters.folder_scan import PATIENT_SCANS


def add(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def names(scan: FolderScan) -> list[str]:
    return [found.name for found in scan.scan()]


def test_each_adapter_is_found_once_in_order_and_again_when_it_changes(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    add(tmp_path / "b"), add(tmp_path / "a")
    assert [names(scan) for _ in range(3)] == [[], ["a", "b"], []]
    add(tmp_path / "a", "{ }")
    assert [names(scan) for _ in range(3)] == [[], ["a"], []]


def test_what_is_still_written_is_left_for_later(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    for i in range(3):
        add(tmp_path / "a", "{" + i * " ")
        assert names(scan) == []
    assert names(scan) == ["a"]


def test_an_adapter_that_went_and_came_back_is_found_again(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    add(tmp_path / "a")
    assert [names(scan) for _ in range(2)] == [[], ["a"]]
    (tmp_path / "a").rename(tmp_path / ".a")
    assert names(scan) == []
    (tmp_path / ".a").rename(tmp_path / "a")
    assert [names(scan) for _ in range(2)] == [[], ["a"]]


def test_what_is_no_adapter_is_left_alone(tmp_path: Path) -> None:
    add(tmp_path / ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for root in (tmp_path, tmp_path / "not-there-yet"):
        scan = FolderScan(root)
        assert [names(scan) for _ in range(3)] == [[], [], []]


def test_a_folder_that_stays_without_a_config_is_named_once_and_loaded_when_it_has_one(
    tmp_path: Path,
) -> None:
    scan = FolderScan(tmp_path)
    add(tmp_path / "training" / "checkpoint-500")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "adapter_model.safetensors").write_text("weights")
    found = [scan.scan() for _ in range(PATIENT_SCANS + 3)]
    assert [len(some) for some in found] == [0] * (PATIENT_SCANS - 1) + [2] + [0] * 3
    training, weights = found[PATIENT_SCANS - 1]
    assert "adapter_config.json" in training.problem and "checkpoint-500" in training.problem
    assert "adapter_config.json" in weights.problem and "move" not in weights.problem
    add(tmp_path / "weights")
    assert [[(f.name, f.problem) for f in scan.scan()] for _ in range(2)] == [[], [("weights", "")]]


@pytest.mark.parametrize("what", ["folder", "file", "dots"])
def test_links_that_lead_out_are_refused_and_others_are_not(what: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", add(tmp_path / "outside")
    add(root / "real")
    (root / "inside").symlink_to(root / "real")
    if what == "file":
        (root / "link").mkdir()
        (root / "link" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    else:
        (root / "link").symlink_to(outside if what == "folder" else Path("../outside"))
    scan = FolderScan(root)
    scan.scan()
    problems = {found.name: found.problem for found in scan.scan()}
    assert problems["real"] == problems["inside"] == ""
    assert "leads out of" in problems["link"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    add(tmp_path / "root" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    scan = FolderScan(tmp_path / "link")
    scan.scan()
    assert [(found.name, found.problem) for found in scan.scan()] == [("a", "")]
