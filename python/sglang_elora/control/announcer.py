"""Non-blocking sender of hints: names the adapters that a server's next requests will use."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from sglang_elora.control.hint_limiter import HintLimiter

logger = logging.getLogger(__name__)

_MOST_QUEUED = 256  # names; further ones are dropped
_GAP_S = 0.05  # a repeated name within this time is dropped, a later one sent
_QUIET_S = 5.0  # without announcements after a server could not be reached
_NOT_FOR_US = {401: "it wants an admin key", 403: "it wants an admin key", 404: "it has none"}


class Announcer:
    """Posts adapter names from its own thread, in order; lossy by design.

    The caller never sees an error. A name is dropped if the queue is full, the server cannot be
    reached, or the server does not know it. If the server has no such endpoint or denies access
    to it, the announcer disables itself.

    Args:
        post: Sends names and returns the HTTP status; raises OSError without an HTTP answer.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, post: Callable[[Sequence[str]], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._post = post
        self._clock = clock
        self._gate = HintLimiter(clock, gap_s=_GAP_S)
        self._queue: queue.Queue[str] = queue.Queue(_MOST_QUEUED)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._quiet_until_s = float("-inf")
        self.enabled = True
        self.num_announced = 0  # adapter names; only manipulated by the thread
        self.num_dropped = 0

    def announce(self, names: Iterable[str | None]) -> None:
        """Queue hints that requests with these adapters will follow. Never blocks; ignores the
        base model (None or "")."""
        wanted = [name for name in names if name]
        if not wanted or not self.enabled or self._clock() < self._quiet_until_s:
            return
        with self._lock:
            for name in self._gate.admit(wanted):
                try:
                    self._queue.put_nowait(name)
                except queue.Full:
                    self.num_dropped += 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="elora-announcer", daemon=True
                )
                self._thread.start()

    def drain(self) -> None:
        """Wait until all queued names have been sent or dropped."""
        self._queue.join()

    def _run(self) -> None:
        while True:
            names = [self._queue.get()]
            while not self._queue.empty():
                names.append(self._queue.get())
            try:
                if self.enabled:
                    self._send(names)
            except OSError as error:
                logger.debug("adapters not announced: %s", error)
                self._quiet_until_s = self._clock() + _QUIET_S
                self.num_dropped += len(names)
            finally:
                for _ in names:
                    self._queue.task_done()

    def _send(self, names: Sequence[str]) -> None:
        status = self._post(names)
        if status in _NOT_FOR_US:
            logger.info("no adapters are announced to this server: %s", _NOT_FOR_US[status])
            self.enabled = False
        elif status < 300:
            self.num_announced += len(names)
        elif status == 400 and len(names) > 1:
            for name in names:  # the server refuses a whole message with one unknown name
                self._send([name])
        else:
            self.num_dropped += len(names)
