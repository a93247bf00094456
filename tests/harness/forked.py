"""Python processes forked from one that has imported ``preload.py``.

A process of its own would import all of that again: most of its processor time.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

FORKSERVER = "multiprocessing.forkserver"
"""Part of the command of the process that others are forked from."""

_ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")


class ForkedServer:
    """What ``ServerProcess`` uses of ``subprocess.Popen``, for ``python -m module arguments``."""

    def __init__(self, command: Sequence[str], *, stdout: Any, env: Mapping[str, str], **_: Any):
        assert list(command[:2]) == [sys.executable, "-m"], command
        self._process = _start(command[1:], env, os.getcwd(), stdout.name, stdout.name)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of Python with ``-c code`` or ``-m module`` and what they are given."""
    ensure_started()
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as err:
        process = _start(arguments, env, str(cwd), out.name, err.name)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([*arguments], timeout, out.read(), err.read())
        assert process.exitcode is not None
        return subprocess.CompletedProcess([*arguments], process.exitcode, out.read(), err.read())


def ensure_started() -> None:
    """Start the process that others are forked from, unless it runs."""
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), given)))
    try:
        _CONTEXT.set_forkserver_preload(["tests.harness.preload"])
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if given is not None:
            os.environ["PYTHONPATH"] = given


def _start(
    arguments: Sequence[str], env: Mapping[str, str], cwd: str, out: str, err: str
) -> multiprocessing.process.BaseProcess:
    process = _CONTEXT.Process(target=_run, args=([*arguments], dict(env), cwd, out, err))
    process.start()
    return process


def _run(arguments: Sequence[str], env: Mapping[str, str], cwd: str, out: str, err: str) -> None:
    """In a new process: become ``python arguments`` with this environment and these files."""
    os.setsid()
    os.chdir(cwd)
    for path, flags, target in (
        (os.devnull, os.O_RDONLY, 0),
        (out, os.O_WRONLY | os.O_APPEND, 1),
        (err, os.O_WRONLY | os.O_APPEND, 2),
    ):
        os.dup2(os.open(path, flags), target)
    sys.stdin = open(0, closefd=False)  # uvicorn hands its number to its workers
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    # The parent's path has the checkout on it, where the package's metadata lies too.
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry) != _ROOT]
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    option, what, *rest = arguments
    if option == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c", arguments
        sys.argv = ["-c", *rest]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), main.__dict__)
