"""Run Python in a fresh process: what is under test changes SGLang for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """``run_python(*arguments, path=folder, **environment)``: the finished process."""

    def run(
        *arguments: str, path: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **environment}
        if path is not None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300
        )

    return run
