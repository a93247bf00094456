"""A watched folder: a new adapter is reported once, when complete, and only from inside."""

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


def test_folder_scan_reports_each_adapter_once_and_again_on_change(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    add(tmp_path / "b"), add(tmp_path / "a")
    assert [names(scan) for _ in range(3)] == [[], ["a", "b"], []]
    add(tmp_path / "a", "{ }")
    assert [names(scan) for _ in range(3)] == [[], ["a"], []]


def test_folder_scan_skips_adapters_still_being_written(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    for i in range(3):
        add(tmp_path / "a", "{" + i * " ")
        assert names(scan) == []
    assert names(scan) == ["a"]


def test_folder_scan_reports_a_removed_and_restored_adapter_again(tmp_path: Path) -> None:
    scan = FolderScan(tmp_path)
    add(tmp_path / "a")
    assert [names(scan) for _ in range(2)] == [[], ["a"]]
    (tmp_path / "a").rename(tmp_path / ".a")
    assert names(scan) == []
    (tmp_path / ".a").rename(tmp_path / "a")
    assert [names(scan) for _ in range(2)] == [[], ["a"]]


def test_folder_scan_ignores_other_files_and_folders(tmp_path: Path) -> None:
    add(tmp_path / ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for root in (tmp_path, tmp_path / "not-there-yet"):
        scan = FolderScan(root)
        assert [names(scan) for _ in range(3)] == [[], [], []]


def test_folder_scan_warns_once_of_a_missing_config_then_loads(
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
def test_folder_scan_refuses_only_symlinks_out_of_the_root(what: str, tmp_path: Path) -> None:
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


def test_folder_scan_accepts_a_symlinked_root(tmp_path: Path) -> None:
    add(tmp_path / "root" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    scan = FolderScan(tmp_path / "link")
    scan.scan()
    assert [(found.name, found.problem) for found in scan.scan()] == [("a", "")]
