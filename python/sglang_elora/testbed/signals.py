"""Handling of SIGINT and SIGTERM while a server runs, and while it is being stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_acts_as_ctrl_c() -> Iterator[None]:
    """Context in which SIGTERM unwinds the stack as Ctrl-C does, instead of killing the process.

    SIGTERM calls the current SIGINT handler: inside ``asyncio.run`` that cancels the main task,
    whereas raising an exception directly would leave other tasks running. Does nothing outside the
    main thread (Python sets handlers only there), or if SIGTERM already has a handler.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # SIGINT is ignored, as in a background job of a shell
            raise KeyboardInterrupt
        interrupt(signum, frame)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Context that ignores SIGINT and SIGTERM, for clean-up of a few seconds that a second Ctrl-C
    must not interrupt."""
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
