"""The demo's server process: it leaves no process in any case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from sglang_elora.testbed.server import ServerProcess, ServerStartError, free_port, python_module
from tests.harness.programs import source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``fake_server`` can be imported from and leaves its process ids."""
    (tmp_path / "fake_server.py").write_text(source("fake_server"))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    return tmp_path


def fake_server(
    folder: Path, flags: Sequence[str] = (), timeout_s: float = 30, port: int | None = None
) -> ServerProcess:
    return ServerProcess(
        flags,
        program=python_module("fake_server"),
        log_path=folder / "logs" / "server.log",
        startup_timeout_s=timeout_s,
        stop_timeout_s=1.0,
        port=port,
    )


def running(folder: Path) -> list[int]:
    """Which of the fake server's processes run."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 3
    return [pid for pid in pids if psutil.pid_exists(pid) and is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_demo_server_serves_and_stops(folder: Path) -> None:
    with fake_server(folder) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.returncode is None
        assert len(running(folder)) == 3
        assert server.pid in running(folder)
        assert set(running(folder)) <= set(server.alive())
    assert running(folder) == []
    assert server.alive() == []


@pytest.fixture
def other_server() -> Iterator[int]:
    """Port of a server that answers ``GET /health`` and is not ours."""
    other = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=other.serve_forever).start()
    yield other.server_port
    other.shutdown()
    other.server_close()


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_demo_server_takes_another_port_when_its_own_was_taken(
    folder: Path, other_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_port()
    ports = iter([other_server, free])
    monkeypatch.setattr("sglang_elora.testbed.server.free_port", lambda: next(ports))
    with fake_server(folder) as server:
        assert server.port == free
        assert server.command[-1] == str(free)
        assert len(running(folder)) == 3
    assert running(folder) == []


def test_demo_server_does_not_take_another_server_for_its_own(
    folder: Path, other_server: int
) -> None:
    with (
        pytest.raises(ServerStartError, match=r"(?i)address already in use"),
        fake_server(folder, port=other_server),
    ):
        pass
    assert running(folder) == []


@pytest.mark.parametrize("error", [KeyError("body"), KeyboardInterrupt(), SystemExit(1)])
def test_demo_server_stops_when_the_body_raises(folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), fake_server(folder):
        raise error
    assert running(folder) == []


def test_demo_server_ends_children_of_a_crashed_server(folder: Path) -> None:
    with fake_server(folder) as server:
        httpx.get(f"{server.url}/crash")
        while server.returncode is None:
            time.sleep(0.01)
        assert len(running(folder)) == 2
    assert running(folder) == []
    assert server.returncode == 1


def test_demo_server_early_exit_shows_the_log(folder: Path) -> None:
    with pytest.raises(ServerStartError) as caught, fake_server(folder, ["--fail"]):
        pass
    text = str(caught.value)
    assert "exited with status 3" in text
    assert "fake_server --fail --host 127.0.0.1 --port" in text
    assert [f"line {i}" for i in range(60, 100)] == text.splitlines()[-40:]
    assert "line 59" not in text
    assert running(folder) == []


def test_demo_server_start_up_timeout_is_an_error(folder: Path) -> None:
    with (
        pytest.raises(ServerStartError, match="was not healthy after 2 s"),
        fake_server(folder, ["--never-healthy"], timeout_s=2),
    ):
        pass
    assert running(folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_server_stops_when_its_owner_gets_a_signal(
    folder: Path, number: signal.Signals
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", source("hold_server"), str(folder / "server.log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert len(running(folder)) == 3
        owner.send_signal(number)
        owner.send_signal(number)  # an impatient user must not stop the cleaning-up
        assert owner.wait(timeout=30) != 0
    assert running(folder) == []


def test_demo_server_stop_works_twice_and_before_start(folder: Path) -> None:
    server = fake_server(folder)
    server.stop()
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.pid
    with server:
        server.stop()
        assert running(folder) == []
