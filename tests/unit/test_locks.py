"""The locks name every package once, at one version, with the sha256 of its files."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
EXPECTED = ROOT / "requirements" / "pip_check.txt"


def entries(lock: Path) -> list[str]:
    """The requirements of a lock, each with its hashes on one line."""
    text = re.sub(r" \\\n +", " ", lock.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked() -> list[Requirement]:
    """All requirements of all locks, without hashes."""
    return [Requirement(entry.split(" --hash=")[0]) for lock in LOCKS for entry in entries(lock)]


def ranges() -> dict[str, list[Requirement]]:
    """What each extra of pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        extra: [Requirement(line) for line in lines if not line.startswith(project["name"])]
        for extra, lines in project["optional-dependencies"].items()
    }


def short(line: str) -> str:
    """A line of `pip check` without versions, as in the list of what is expected."""
    for pattern, words in (
        (r"(\S+) \S+ requires (\S+), which is not installed\.", "misses"),
        (r"(\S+) \S+ has requirement ([\w.-]+).*, but you have .*", "differs on"),
    ):
        if found := re.fullmatch(pattern, line):
            return f"{canonicalize_name(found[1])} {words} {canonicalize_name(found[2])}"
    return line


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    """What requirements/lock.py defines."""
    return runpy.run_path(str(ROOT / "requirements" / "lock.py"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_each_package_of_a_lock_has_one_version_and_a_sha256(lock: Path) -> None:
    assert entries(lock)
    for entry in entries(lock):
        requirement, *hashes = entry.split(" --hash=")
        (version,) = Requirement(requirement).specifier
        assert version.operator == "==", entry
        assert "*" not in version.version, entry
        assert hashes, entry
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), entry
        assert len(hashes) == len(set(hashes)), entry


def test_no_package_is_locked_twice() -> None:
    names = [canonicalize_name(requirement.name) for requirement in locked()]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


def test_each_package_of_an_extra_has_version_bounds() -> None:
    for extra, requirements in ranges().items():
        for requirement in requirements:
            signs = {part.operator for part in requirement.specifier}
            assert signs in ({">=", "<"}, {"=="}), f"{extra}: {requirement}"


def test_locked_versions_are_within_the_bounds_of_the_extras() -> None:
    versions = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in locked()}
    asked = [r for requirements in ranges().values() for r in requirements]
    both = [r for r in asked if canonicalize_name(r.name) in versions]
    assert both
    for requirement in both:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="SGLang is whole on CUDA machines"
)
def test_pip_check_reports_only_expected_conflicts() -> None:
    expected = {line for line in EXPECTED.read_text().splitlines() if not line.startswith("#")}
    result = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode in (0, 1), result.stderr
    found = {short(line) for line in result.stdout.splitlines()}
    assert found - expected - {"No broken requirements found."} == set()


@pytest.mark.parametrize(
    ("filename", "kept"),
    [
        ("some_name-1.0.tar.gz", True),
        ("some_name-1.0-py3-none-any.whl", True),
        ("some_name-1.0-py2.py3-none-any.whl", True),
        ("some_name-1.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("some_name-1.0-cp311-cp311-manylinux_2_28_aarch64.whl", True),
        ("some_name-1.0-cp312-cp312-macosx_11_0_arm64.whl", True),
        ("some_name-1.1-py3-none-any.whl", False),
        ("some_name-1.0-cp39-cp39-manylinux_2_28_x86_64.whl", False),
        ("some_name-1.0-cp313-cp313t-manylinux_2_28_x86_64.whl", False),
        ("some_name-1.0-cp314-cp314-manylinux_2_28_x86_64.whl", False),
        ("some_name-1.0-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("some_name-1.0-cp311-cp311-manylinux_2_28_s390x.whl", False),
        ("some_name-1.0-cp311-cp311-win_amd64.whl", False),
        ("some_name-1.0.exe", False),
    ],
)
def test_lock_tool_keeps_files_for_supported_platforms_only(
    tool: dict[str, Any], filename: str, kept: bool
) -> None:
    assert tool["wanted"](filename, Version("1.0")) is kept


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_tool_leaves_an_up_to_date_lock_unchanged(tool: dict[str, Any], lock: Path) -> None:
    present = {
        requirement.partition(" ;")[0]: [value.removeprefix("sha256:") for value in values]
        for requirement, *values in (entry.split(" --hash=") for entry in entries(lock))
    }
    rewritten = tool["rewritten"]
    rewritten.__globals__["hashes"] = present.__getitem__
    assert "\n".join(rewritten(lock.read_text().splitlines())) + "\n" == lock.read_text()


def test_lock_tool_extra_files_are_of_locked_versions(tool: dict[str, Any]) -> None:
    assert set(tool["ELSEWHERE"]) <= {str(requirement) for requirement in locked()}
