"""A server as a subprocess that is ended with all its children, however its caller ends."""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from types import TracebackType

import httpx

from sglang_elora.testbed.process_tree import ProcessTree
from sglang_elora.testbed.signals import signals_ignored, sigterm_acts_as_ctrl_c

HOST = "127.0.0.1"
LOG_TAIL_LINES = 40

_PORTS = range(10_000, 22_000)  # below SGLang's own, and those of outgoing connections
_PORT_TAKEN = "address already in use"
_MAX_STARTS = 3  # on other ports
_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 25.0  # above the 20 s timeout of SGLang's /health


def python_module(name: str) -> tuple[str, ...]:
    """The command ``python -m name``, with this interpreter."""
    return (sys.executable, "-m", name)


ELORA_SERVER = python_module("sglang_elora.launch_server")


class ServerStartError(RuntimeError):
    """The server exited or was not healthy in time at start; the text ends with its last log
    lines."""


class ServerProcess:
    """Context manager that starts a server, waits until it is healthy, and ends all its processes.

    ``<program> <flags> --host 127.0.0.1 --port <port>`` runs in its own session, so that
    a terminal's Ctrl-C reaches only the caller, who then stops the server in order. Leaving the
    context stops the server's whole process tree, also after an exception, KeyboardInterrupt or
    SIGTERM (inside the context, SIGTERM acts as Ctrl-C unless it already has a handler).

    Args:
        flags: Command line of the server, without host and port.
        log_path: File that receives stdout and stderr; overwritten.
        env: Variables added to this process's environment.
        program: Command to run; it must answer ``GET /health`` with 200 once it can serve.
        startup_timeout_s: Seconds to wait for that answer.
        stop_timeout_s: Seconds between SIGTERM and SIGKILL; SGLang checks for SIGTERM every 5 s.
        port: Port to listen on. By default a free one, and another one when a process takes that
            before the server does.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ELORA_SERVER,
        startup_timeout_s: float = 180.0,
        stop_timeout_s: float = 8.0,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.log_path = log_path
        self._may_change_port = port is None
        self._program_and_flags = [*program, *flags]
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._startup_timeout_s = startup_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._popen: Popen[bytes] | None = None
        self._tree: ProcessTree | None = None
        self._signals = ExitStack()

    @property
    def command(self) -> list[str]:
        """The whole command line, host and port included."""
        return [*self._program_and_flags, "--host", HOST, "--port", str(self.port)]

    @property
    def url(self) -> str:
        """Root of the HTTP API, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server's main process.

        Raises:
            RuntimeError: It was never started.
        """
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the main process, None while it runs."""
        return self._started().poll()

    def __enter__(self) -> ServerProcess:
        self._signals.enter_context(sigterm_acts_as_ctrl_c())
        try:
            self.start()
        except BaseException:
            self._signals.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._signals.close()

    def start(self) -> None:
        """Start the server and wait until it is healthy; on failure end all its processes.

        Raises:
            ServerStartError: The server exited early, or was not healthy in time.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        for num_starts in range(1, _MAX_STARTS + 1):
            try:
                return self._start_once()
            except ServerStartError:
                port_taken = _PORT_TAKEN in self.log_path.read_text(errors="replace").lower()
                if not (self._may_change_port and port_taken) or num_starts == _MAX_STARTS:
                    raise
            self.port = free_port()

    def _start_once(self) -> None:
        try:
            with self.log_path.open("wb") as log:
                self._popen = Popen(
                    self.command,
                    stdin=DEVNULL,
                    stdout=log,
                    stderr=STDOUT,
                    env=self._env,
                    start_new_session=True,
                )
            self._tree = ProcessTree(self._popen.pid)
            self._wait_until_healthy(self._tree)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the server. Idempotent; ignores Ctrl-C and SIGTERM meanwhile.

        Raises:
            RuntimeError: A process outlived SIGKILL.
        """
        if self._popen is None or self._tree is None:
            return
        with signals_ignored():
            self.resume()  # a stopped process would not see SIGTERM
            self._tree.end(self._stop_timeout_s)
            self._popen.wait()

    def suspend(self) -> None:
        """Stop all processes of the server (SIGSTOP) until ``resume``."""
        assert self._tree is not None, "the server was not started"
        self._tree.suspend()

    def resume(self) -> None:
        """Let all processes run again. Idempotent."""
        assert self._tree is not None, "the server was not started"
        self._tree.resume()

    def wait(self) -> int:
        """Block until the main process exits by itself; return its exit status."""
        return self._started().wait()

    def alive(self) -> list[int]:
        """Ids of the server's processes that still run, at any depth."""
        return [process.pid for process in self._tree.alive()] if self._tree else []

    def log_tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the server's log."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _started(self) -> Popen[bytes]:
        if self._popen is None:
            raise RuntimeError("the server was not started: use it as a context manager")
        return self._popen

    def _wait_until_healthy(self, tree: ProcessTree) -> None:
        started = time.monotonic()
        while (elapsed_s := time.monotonic() - started) < self._startup_timeout_s:
            tree.collect()  # to find the children even if the main process crashes
            if self.returncode is not None:
                raise self._start_error(f"exited with status {self.returncode}", elapsed_s)
            remaining_s = self._startup_timeout_s - elapsed_s
            if self._is_healthy(timeout_s=min(_HEALTH_TIMEOUT_S, remaining_s)):
                tree.collect()
                if tree.listens_on(self.port):  # and not another server that had the port first
                    return
            time.sleep(_POLL_S)
        raise self._start_error("was not healthy", self._startup_timeout_s)

    def _is_healthy(self, timeout_s: float) -> bool:
        try:
            answer = httpx.get(f"{self.url}/health", timeout=timeout_s, trust_env=False)
        except httpx.TransportError:  # not listening yet, or busy starting
            return False
        return answer.status_code == httpx.codes.OK

    def _start_error(self, what: str, elapsed_s: float) -> ServerStartError:
        return ServerStartError(
            f"the server {what} after {elapsed_s:.0f} s\n"
            f"command: {' '.join(self.command)}\n"
            f"last lines of {self.log_path}:\n{self.log_tail()}"
        )


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free just now, and that no outgoing connection is given.

    Raises:
        OSError: No port could be bound.
    """
    ports = list(_PORTS)
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {_PORTS.start} to {_PORTS.stop - 1} on {HOST}")
