"""All descendants of a process, including those whose parent has already ended."""

from __future__ import annotations

import os
import signal
import time

import psutil  # type: ignore[import-untyped, unused-ignore]

_POLL_S = 0.1


class ProcessTree:
    """The descendants of a session leader, and every other process of its session.

    A child that outlives its parent is adopted by init and leaves the tree. It is still found by
    its session or, if it opened a session of its own, because an earlier ``collect`` saw it.
    """

    def __init__(self, leader_pid: int) -> None:
        self._leader_pid = leader_pid
        self._processes: set[psutil.Process] = set()  # grows in collect, never shrinks

    def collect(self) -> None:
        """Add the processes that belong to the tree now."""
        for pid in psutil.pids():
            try:
                if pid == self._leader_pid or os.getsid(pid) == self._leader_pid:
                    self._processes.add(psutil.Process(pid))
            except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                continue  # has ended, or belongs to another user
        for process in list(self._processes):
            try:
                self._processes.update(process.children(recursive=True))
            except psutil.NoSuchProcess:
                continue

    def alive(self) -> list[psutil.Process]:
        """Collected processes that still run. Zombies, which only wait for their parent, do not."""
        return [process for process in self._processes if _runs(process)]

    def listens_on(self, port: int) -> bool:
        """Whether a collected process listens on TCP port ``port``."""
        return any(port in _listening_ports(process) for process in self.alive())

    def suspend(self) -> None:
        """Send SIGSTOP to every process of the tree."""
        self.collect()
        for process in self.alive():
            _send(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT to every collected process."""
        for process in self.alive():
            _send(process, signal.SIGCONT)

    def end(self, patience_s: float) -> None:
        """Send SIGTERM to the leader, and SIGKILL to the rest when it has ended or after
        ``patience_s``.

        Only the leader gets SIGTERM: it ends its children in order, and would take a child that
        ends by itself for a crash.

        Raises:
            RuntimeError: A process outlived SIGKILL by ``patience_s``.
        """
        self.collect()
        leader = [process for process in self.alive() if process.pid == self._leader_pid]
        for process in leader:
            _send(process, signal.SIGTERM)
        _gone_within(patience_s, leader)
        self.collect()
        while alive := self.alive():
            for process in alive:
                _send(process, signal.SIGKILL)
            if not _gone_within(patience_s, alive):
                raise RuntimeError(f"processes survived SIGKILL: {self.alive()}")
            self.collect()  # a child may have been started while its parent was ending


def _gone_within(patience_s: float, processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + patience_s
    while any(_runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _listening_ports(process: psutil.Process) -> set[int]:
    try:
        connections = process.net_connections(kind="tcp")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return set()
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # already ended, as intended
