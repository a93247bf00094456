"""What travels to the GPU machine is counted whole, and held to its limit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu import travel

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"

BUNDLE_MIB = 46
"""MiB. What ``bundle.sh`` makes may weigh at most this; the rest is the tracked tree's."""

IN_THE_IMAGE = (
    *("matplotlib", "contourpy", "cycler", "kiwisolver", "pyparsing", "fonttools", "pillow"),
    *("pytest", "pluggy", "iniconfig", "pygments", "packaging", "peft", "accelerate", "rich"),
    *("markdown-it-py", "mdurl"),
)


def test_travel_size_counts_all_but_git_ignored_files(tmp_path: Path) -> None:
    root, bundle = tmp_path / "tree", tmp_path / "bundle"
    (root / "docs").mkdir(parents=True)
    bundle.mkdir()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name, size in {"docs/a": 10, "new": 5, "ignored": 99, ".gitignore": 0}.items():
        (root / name).write_bytes(b"x" * size)
    (root / ".gitignore").write_text("ignored\n")
    subprocess.run(["git", "add", "docs"], cwd=root, check=True)
    (bundle / "site.tar.xz").write_bytes(b"x" * 7)
    assert travel.sizes(bundle, root) == Counter(
        {"docs": 10, "bundle": 7, "new": 5, ".gitignore": 8}
    )


def test_travel_size_fits_up_to_its_limit() -> None:
    assert travel.fits(Counter({"a": travel.MIB, "b": travel.MIB}), 2)
    assert not travel.fits(Counter({"a": travel.MIB, "b": travel.MIB + 1}), 2)


def test_travel_of_an_empty_bundle_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "travel.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "holds no bundle" in done.stderr


def test_work_tree_leaves_room_for_the_gpu_bundle() -> None:
    found = travel.sizes()
    found["bundle"] = BUNDLE_MIB * travel.MIB
    assert travel.fits(found), found.most_common(5)


@pytest.mark.parametrize("package", IN_THE_IMAGE)
def test_gpu_bundle_omits_packages_of_the_image(package: str) -> None:
    assert not re.search(rf"\b{package}==", (FOLDER / "bundle.sh").read_text())
