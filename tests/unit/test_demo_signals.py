"""SIGTERM interrupts running code as Ctrl-C does, but not clean-up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest

from sglang_elora.testbed.signals import signals_ignored, sigterm_acts_as_ctrl_c


def send_to_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.2)


@pytest.fixture(autouse=True)
def sigterm_unhandled() -> Iterator[None]:
    """The servers of other tests may be up, and they handle SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_raises_keyboard_interrupt() -> None:
    with sigterm_acts_as_ctrl_c(), pytest.raises(KeyboardInterrupt):
        send_to_self(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_raises_keyboard_interrupt_if_sigint_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with sigterm_acts_as_ctrl_c(), pytest.raises(KeyboardInterrupt):
            send_to_self(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_cancels_tasks() -> None:
    """As an exception out of a callback it would leave them pending, which asyncio complains of."""
    ended: list[int] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)

    async def both() -> None:
        asyncio.get_running_loop().call_later(0.1, send_to_self, signal.SIGTERM)
        await asyncio.gather(wait(1), wait(2))

    with sigterm_acts_as_ctrl_c(), pytest.raises(KeyboardInterrupt):
        asyncio.run(both())
    assert sorted(ended) == [1, 2]


def test_sigterm_handler_set_by_others_is_kept() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with sigterm_acts_as_ctrl_c():
            send_to_self(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


def test_clean_up_is_not_interrupted() -> None:
    with sigterm_acts_as_ctrl_c():
        with signals_ignored():
            send_to_self(signal.SIGTERM)
            send_to_self(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send_to_self(signal.SIGTERM)
