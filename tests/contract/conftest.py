"""Run Python in a process of its own: what is under test changes SGLang for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness import forked
from tests.harness.run_python import RunPython


@pytest.fixture
def run_python(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """``run_python(*arguments, path=folder, **environment)``: the finished process.

    It is forked from one that has imported what SGLang imports of others, and nothing of SGLang.
    It runs in an empty folder: in a checkout, Python would find the package's metadata there
    first, and the order in which plugins load would be another one than in an installation.
    """
    return _runner(forked.run, tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def run_fresh_python(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """As ``run_python``, in a process that has imported nothing."""
    return _runner(_spawn, tmp_path_factory.mktemp("cwd"))


def _runner(run: Callable[..., subprocess.CompletedProcess[str]], folder: Path) -> RunPython:
    def runner(
        *arguments: str, path: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        if path is not None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH"))))
        return run(arguments, cwd=folder, env=env, timeout=300)

    return runner


def _spawn(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
