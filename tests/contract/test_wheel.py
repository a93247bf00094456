"""A wheel built from the repository works without a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests"),
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contents_are_complete(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {
        str(path.relative_to(ROOT / "python"))
        for path in (ROOT / "python" / "sglang_elora").rglob("*.py")
    }
    assert packaged <= names
    assert {"sglang_elora/py.typed", "sglang_elora/kernels/__init__.py"} <= names
    assert {f"sglang_elora/patches/{p.name}" for p in (ROOT / "patches").iterdir()
            if p.suffix in (".patch", ".md", ".py")} <= names  # fmt: skip
    assert all(name.split("/")[0].startswith("sglang_elora") for name in names)


def test_wheel_works_outside_the_checkout(
    wheel: Path, run_fresh_python: RunPython, tmp_path: Path
) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    result = run_fresh_python("-c", source("wheel_in_use"), str(target), path=target)
    assert result.returncode == 0, result.stderr
    assert "in use" in result.stdout
