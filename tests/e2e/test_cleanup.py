"""Processes end with those they belong to: the servers of a failing test, and a server that lost
one of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from sglang_elora.control.connections import LIMITS
from sglang_elora.testbed.server import ServerProcess
from tests.harness.programs import source
from tests.harness.server_flags import server_flags


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("fails", pytest.ExitCode.TESTS_FAILED),
        ("interrupted", pytest.ExitCode.INTERRUPTED),
    ],
    ids=["fails", "interrupted"],
)
def test_server_leaves_no_process_after_each_way_to_end(
    ending: str, status: pytest.ExitCode, checkpoint: Path, tmp_path: Path, spawned_start: None
) -> None:
    flags = [*server_flags(checkpoint), "--max-lora-rank", "8", "--lora-target-modules", "q_proj"]
    pids, log = tmp_path / "pids", tmp_path / "server.log"
    inner = tmp_path / "test_inner.py"
    inner.write_text(source("fails_with_server"))
    given = {"flags": flags, "log": str(log), "pids": str(pids), "ending": ending}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)],
        cwd=tmp_path,
        env={**os.environ, "FAILING_TEST": json.dumps(given)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == status, result.stdout + result.stderr
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 3  # main, scheduler, detokenizer
    assert [pid for pid in started if runs(pid)] == []


@pytest.mark.parametrize("name", ["detokenizer", "scheduler"])
def test_server_that_loses_a_process_ends_and_logs_it(
    name: str, checkpoint: Path, adapters: dict[str, Path], logs: Path
) -> None:
    """Within ten seconds, in which its clients have their connections closed."""
    flags = ["--elora", *server_flags(checkpoint, {"qv-r4": adapters["qv-r4"]})]
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
    with ServerProcess(flags, log_path=logs / f"lost-{name}.log") as server:
        children = sorted(psutil.Process(server.pid).children(), key=psutil.Process.create_time)
        lost = dict(zip(("scheduler", "detokenizer"), children[-2:], strict=True))[name]
        with (
            httpx.Client(base_url=server.url, timeout=60, trust_env=False, limits=LIMITS) as http,
            http.stream("POST", "/generate", json={**body, "stream": True}) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            lost.kill()
            deadline_s = time.monotonic() + 10
            with pytest.raises(httpx.TransportError):
                list(lines)
        while server.alive() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert server.alive() == [], server.log_tail()
        log = server.log_path.read_text()
    assert re.search(rf"Subprocess {name}\S* \(pid={lost.pid}\) crashed", log)


def runs(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
