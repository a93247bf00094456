"""Servers forked from a process that has imported ``preload.py``."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORKSERVER = "multiprocessing.forkserver"
"""Part of the command of the process that servers are forked from."""

_TESTS = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")


class ForkedServer:
    """What ``ServerProcess`` uses of ``subprocess.Popen``, for ``python -m module arguments``."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Mapping[str, str], **_: Any):
        assert list(command[:2]) == [sys.executable, "-m"], command
        arguments = (command[2:], dict(env), stdout.name)
        self._process = _CONTEXT.Process(target=_run_module, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def start() -> None:
    """Start the process that servers are forked from."""
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_TESTS / "e2e"), given)))
    try:
        _CONTEXT.set_forkserver_preload(["preload"])
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if given is not None:
            os.environ["PYTHONPATH"] = given


def _run_module(command: Sequence[str], env: Mapping[str, str], log_path: str) -> None:
    """In a new process: become ``python -m command`` with this environment and this log."""
    os.setsid()
    log, nothing = os.open(log_path, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    # The parent's path has tests and benchmarks on it.
    for folder in (_TESTS, _TESTS.parent / "benchmarks"):
        sys.path[:] = [entry for entry in sys.path if not Path(entry).is_relative_to(folder)]
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
