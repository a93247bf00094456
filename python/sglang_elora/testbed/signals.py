"""What SIGINT and SIGTERM do while a server is up, and while it is being stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_acts_as_ctrl_c() -> Iterator[None]:
    """Unwind the stack on SIGTERM as KeyboardInterrupt does, instead of dying on the spot.

    It is handed to whoever handles Ctrl-C at that moment: inside ``asyncio.run`` that cancels the
    main task, where an exception out of nowhere would leave the other tasks behind. Does nothing
    outside the main thread (Python sets handlers only there), or if SIGTERM already has a handler.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored, as in a job that a shell put in the background
            raise KeyboardInterrupt
        interrupt(signum, frame)

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
