"""Calls to adapter sources on the network, isolated per host.

Each host has separate threads, a timeout per call, and a circuit breaker: after several
consecutive failures or timeouts, further calls are refused at once for a while. So a slow or
unreachable host delays only the requests that need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sglang_elora.adapters import AdapterError

THREADS = 4
"""Threads per host and kind of call. Calls that time out occupy a thread until the file system's
own timeout."""

MOST_WAITING = 64
"""Most unanswered calls to a host; further calls are refused."""

FAILURES_TO_OPEN = 3
"""Consecutive failures after which the breaker opens."""
OPEN_S = 30.0
"""Seconds that the breaker stays open."""

T = TypeVar("T")


class Call(Enum):
    """The kind of a call."""

    LOOK = "whether an adapter is there"
    FETCH = "its files"


TIMEOUTS_S = {Call.LOOK: 10.0, Call.FETCH: 600.0}


class SourceUnavailable(ValueError):
    """A host is not available. The text names it and the reason."""


class _Host:
    """Threads and breaker of one host for one kind of call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.executor = ThreadPoolExecutor(THREADS, thread_name_prefix=name)
        self.num_waiting = 0
        self.num_failed = 0  # consecutive failures
        self.closed_until_s = 0.0

    def answered(self) -> None:
        self.num_waiting -= 1


class SourceCalls:
    """The calls of one process; used only by its event loop.

    Args:
        timeouts_s: Seconds that a call may take.
    """

    def __init__(self, timeouts_s: Mapping[Call, float] = TIMEOUTS_S) -> None:
        self._timeouts_s = timeouts_s
        self._hosts: dict[tuple[str, Call], _Host] = {}

    async def call(self, kind: Call, url: str, function: Callable[..., T], *arguments: Any) -> T:
        """Run ``function(*arguments)`` in a thread of the URL's host and return its result.

        A call that times out continues in its thread, and its result is dropped.

        Raises:
            SourceUnavailable: The breaker is open, too many calls wait, or the call timed out.
            Exception: Any exception of the function.
        """
        name = host_of(url)
        if (name, kind) not in self._hosts:
            self._hosts[name, kind] = _Host(name)
        host, loop = self._hosts[name, kind], asyncio.get_running_loop()
        left_s = host.closed_until_s - time.monotonic()
        if left_s > 0:
            raise SourceUnavailable(
                f"{name} failed {host.num_failed} times in a row, and is asked again in "
                f"{left_s:.0f} s"
            )
        if host.num_waiting >= MOST_WAITING:
            raise SourceUnavailable(f"{name} has {host.num_waiting} calls to answer before")
        host.num_waiting += 1
        timeout_s = self._timeouts_s[kind]
        future = host.executor.submit(function, *arguments)

        def answered(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed at the end of the process
                loop.call_soon_threadsafe(host.answered)

        future.add_done_callback(answered)
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError as error:
            _failed(host)
            text = f"{name} did not answer within {timeout_s:g} s"
            raise SourceUnavailable(text) from error
        except Exception as error:
            is_about_adapter = isinstance(error, AdapterError) and error.__cause__ is None
            if not is_about_adapter:
                _failed(host)
            raise
        host.num_failed = 0
        return result


def _failed(host: _Host) -> None:
    host.num_failed += 1
    if host.num_failed >= FAILURES_TO_OPEN:
        host.closed_until_s = time.monotonic() + OPEN_S


def host_of(url: str) -> str:
    """``scheme://host:port`` of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
