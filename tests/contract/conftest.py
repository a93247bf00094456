"""Run Python in a fresh process: what is under test changes SGLang for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from run_python import RunPython


@pytest.fixture
def run_python(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """``run_python(*arguments, path=folder, **environment)``: the finished process.

    It runs in an empty folder: in a checkout, Python would find the package's metadata there
    first, and the order in which plugins load would be another one than in an installation.
    """
    folder = tmp_path_factory.mktemp("cwd")

    def run(
        *arguments: str, path: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        if path is not None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
