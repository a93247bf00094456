# SPDX-License-Identifier: Apache-2.0
"""What SIGINT and SIGTERM do while a server is up, and while it is being stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_raises_system_exit() -> Iterator[None]:
    """Unwind the stack on SIGTERM instead of dying on the spot.

    Does nothing outside the main thread (Python sets handlers only there), or if SIGTERM already
    has a handler.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """For clean-up that takes seconds at most: a second Ctrl-C must not cut it short."""
    if not _in_main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
