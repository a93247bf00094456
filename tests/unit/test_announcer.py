"""Announcements never fail or block, and stop if the server does not accept them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from sglang_elora.control import Announcer
from sglang_elora.control.announcer import _MOST_QUEUED, _QUIET_S
from sglang_elora.control.hint_limiter import GAP_S


class Server:
    """Answers with the status of the first name that it has one for; counts as reachable."""

    def __init__(self, **status: int) -> None:
        self.status = status
        self.heard: list[list[str]] = []
        self.reachable = True
        self.listening = threading.Event()
        self.listening.set()

    def __call__(self, names: Sequence[str]) -> int:
        assert self.listening.wait(10)
        if not self.reachable:
            raise ConnectionRefusedError
        self.heard.append(list(names))
        return next((self.status[name] for name in names if name in self.status), 200)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_announcer_sends_names_in_order_without_the_base_model() -> None:
    server = Server()
    announcer = Announcer(server, Clock())
    announcer.announce(["a", None, "b", ""])
    announcer.announce([None])
    announcer.announce(["a", "c"])
    announcer.drain()
    assert [name for names in server.heard for name in names] == ["a", "b", "c"]
    assert announcer.num_announced == 3


def test_announcer_batches_queued_names_and_retries_them_singly() -> None:
    server = Server(nobody=400)
    announcer = Announcer(server, Clock())
    server.listening.clear()
    announcer.announce(["first"])
    time.sleep(0.05)  # the thread has taken it
    announcer.announce(["a", "nobody", "b"])
    server.listening.set()
    announcer.drain()
    assert server.heard == [["first"], ["a", "nobody", "b"], ["a"], ["nobody"], ["b"]]
    assert (announcer.num_announced, announcer.num_dropped) == (3, 1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_announcer_is_disabled_if_the_endpoint_is_absent_or_forbidden(status: int) -> None:
    server = Server(a=status)
    announcer = Announcer(server, Clock())
    announcer.announce(["a"])
    announcer.drain()
    announcer.announce(["b"])
    announcer.drain()
    assert server.heard == [["a"]] and not announcer.enabled


def test_announcer_retries_an_unreachable_server_after_a_pause() -> None:
    server, clock = Server(), Clock()
    announcer = Announcer(server, clock)
    server.reachable = False
    announcer.announce(["a"])
    announcer.drain()
    server.reachable = True
    clock.now_s += _QUIET_S / 2
    announcer.announce(["a"])
    announcer.drain()
    assert server.heard == []
    clock.now_s += _QUIET_S
    announcer.announce(["a"])
    announcer.drain()
    assert server.heard == [["a"]] and announcer.enabled


def test_announcer_never_blocks_on_a_slow_server() -> None:
    server = Server()
    announcer = Announcer(server, clock := Clock())
    server.listening.clear()
    started_s = time.monotonic()
    for i in range(3 * _MOST_QUEUED):
        announcer.announce([str(i)])
        clock.now_s += GAP_S
    assert time.monotonic() - started_s < 1
    assert announcer.num_dropped >= 2 * _MOST_QUEUED - 1
    server.listening.set()
    announcer.drain()
    assert announcer.num_announced + announcer.num_dropped == 3 * _MOST_QUEUED
