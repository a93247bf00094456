"""A clock that can be stopped, so that servers can take turns on one machine."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Seconds for which it has run; it is stopped at first. For one event loop."""

    def __init__(self) -> None:
        self._ran_s = 0.0
        self._started_s: float | None = None  # by the monotonic clock; None while stopped
        self._running = asyncio.Event()

    def now_s(self) -> float:
        """The clock's time; it does not advance while the clock is stopped."""
        if self._started_s is None:
            return self._ran_s
        return self._ran_s + time.perf_counter() - self._started_s

    def start(self) -> None:
        if self._started_s is None:
            self._started_s = time.perf_counter()
            self._running.set()

    def stop(self) -> None:
        self._ran_s, self._started_s = self.now_s(), None
        self._running.clear()

    async def sleep_until(self, at_s: float) -> None:
        """Return when the clock shows ``at_s``; not while it is stopped before that."""
        while (left_s := at_s - self.now_s()) > 0:
            await self._running.wait()
            await asyncio.sleep(left_s)
