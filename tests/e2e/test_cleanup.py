"""A test that fails with a real server up leaves none of its processes behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server_flags import server_flags

FAILING_TEST = """
from pathlib import Path
import psutil
import pytest
from sglang_elora.demo.server import ServerProcess

@pytest.fixture
def server():
    with ServerProcess({flags!r}, log_path=Path({log!r})) as server:
        yield server

def test_fails(server):
    pids = server.alive()
    names = [psutil.Process(pid).name() for pid in pids]
    assert any("scheduler" in name for name in names), names
    Path({pids!r}).write_text(" ".join(map(str, pids)))
    {ending}
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("assert False, 'on purpose'", pytest.ExitCode.TESTS_FAILED),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", pytest.ExitCode.INTERRUPTED),
    ],
    ids=["fails", "interrupted"],
)
def test_no_process_is_left(
    ending: str, status: pytest.ExitCode, checkpoint: Path, tmp_path: Path, spawned_start: None
) -> None:
    flags = [*server_flags(checkpoint), "--max-lora-rank", "8", "--lora-target-modules", "q_proj"]
    pids, log = tmp_path / "pids", tmp_path / "server.log"
    inner = tmp_path / "test_inner.py"
    inner.write_text(FAILING_TEST.format(flags=flags, log=str(log), pids=str(pids), ending=ending))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stdout + result.stderr
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 3  # main, scheduler, detokenizer
    assert [pid for pid in started if runs(pid)] == []


def runs(pid: int) -> bool:
    """Whether a process is there and more than a zombie that its parent has yet to collect."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
