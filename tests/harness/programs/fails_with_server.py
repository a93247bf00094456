"""A test that does not pass while a server runs: FAILING_TEST in the environment says how."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from sglang_elora.testbed.server import ServerProcess

GIVEN = json.loads(os.environ["FAILING_TEST"])


@pytest.fixture
def server():
    with ServerProcess(GIVEN["flags"], log_path=Path(GIVEN["log"])) as server:
        yield server


def test_fails(server):
    pids = server.alive()
    names = [psutil.Process(pid).name() for pid in pids]
    assert any("scheduler" in name for name in names), names
    Path(GIVEN["pids"]).write_text(" ".join(map(str, pids)))
    if GIVEN["ending"] == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("on purpose")
