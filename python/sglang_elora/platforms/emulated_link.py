"""An emulated host-to-device link for a machine whose device is the host.

On the CPU platform a copy from host to device is a memcpy and costs almost
nothing, which hides the benefit of a cache. This module gives copies the duration
they would have on a link of given bandwidth and latency, and CPU streams and events
the semantics that this needs: work on a copy stream takes time, and delays only
streams or threads that wait for its event.

The bytes are moved immediately; only the waiting is emulated. Each stream has a
time until which it is busy:

* a copy on an asynchronous stream advances that time, and does not block;
* a copy on any other stream blocks, as a copy that a kernel depends on would;
* recording an event stores the stream's time; an asynchronous stream that waits for it is
  busy until then, any other stream and the host block.

Each direction has a copy engine of its own, which makes copies in order of issue. Copies to the
host take no time unless they have a bandwidth.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from enum import Enum
from typing import Any


class Direction(Enum):
    """Of a copy."""

    TO_DEVICE = "host to device"
    TO_HOST = "device to host"


class Link:
    """A link of ``bytes_per_s`` with ``latency_s`` per copy, its clock and its streams.

    Args:
        bytes_per_s: Bandwidth, positive.
        latency_s: Seconds added to every copy, not negative.
        to_host_bytes_per_s: Bandwidth of copies to the host; None: they take no time.
        clock: Seconds, monotonic. Tests pass their own.
        sleep: Blocks for that many seconds.
    """

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float,
        *,
        to_host_bytes_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.to_host_bytes_per_s = to_host_bytes_per_s
        self.latency_s = latency_s
        self.num_copies = 0
        self.num_bytes = 0
        self.clock = clock
        self._sleep = sleep
        self._busy_until_s = dict.fromkeys(Direction, 0.0)
        self.stream = Stream(self)  # the current stream, switched by StreamContext

    def copy(self, num_bytes: int, direction: Direction = Direction.TO_DEVICE) -> None:
        """Account for one copy on the current stream; blocks unless that is asynchronous."""
        to_host = direction is Direction.TO_HOST
        bytes_per_s = self.to_host_bytes_per_s if to_host else self.bytes_per_s
        if bytes_per_s is None:
            return
        stream = self.stream
        start_s = max(self.clock(), self._busy_until_s[direction], stream.busy_until_s)
        stream.busy_until_s = start_s + self.latency_s + num_bytes / bytes_per_s
        self._busy_until_s[direction] = stream.busy_until_s
        self.num_copies += 1
        self.num_bytes += num_bytes
        if not stream.asynchronous:
            stream.synchronize()

    def wait_until(self, moment_s: float) -> None:
        remaining_s = moment_s - self.clock()
        if remaining_s > 0:
            self._sleep(remaining_s)

    def install(self, device_module: Any) -> None:
        """Replace the streams and events of ``device_module`` (torch.cpu) by this link's."""
        device_module.Stream = functools.partial(Stream, self)
        device_module.Event = functools.partial(Event, self)
        device_module.StreamContext = StreamContext
        device_module.stream = StreamContext
        device_module.current_stream = self.current_stream

    def current_stream(self, device: Any = None) -> Stream:
        return self.stream


class Stream:
    """A stream that is busy until a given time. Creators of copy streams set ``asynchronous``."""

    def __init__(self, link: Link, device: Any = None, priority: int = -1) -> None:
        self.link = link
        self.asynchronous = False
        self.busy_until_s = 0.0

    def wait_stream(self, stream: Stream) -> None:
        self._wait_until(stream.busy_until_s)

    def wait_event(self, event: Event) -> None:
        self._wait_until(event.ready_s)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.link)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.link.wait_until(self.busy_until_s)

    def _wait_until(self, moment_s: float) -> None:
        """Let later work on this stream start no earlier than ``moment_s``."""
        if self.asynchronous:
            self.busy_until_s = max(self.busy_until_s, moment_s)
        else:
            self.link.wait_until(moment_s)


class Event:
    """The time at which the work enqueued on a stream so far is complete."""

    def __init__(self, link: Link, enable_timing: bool = False) -> None:
        self.link = link
        self.ready_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        busy_until_s = (stream or self.link.stream).busy_until_s
        self.ready_s = max(busy_until_s, self.link.clock())

    def query(self) -> bool:
        return self.link.clock() >= self.ready_s

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.link.stream).wait_event(self)

    def synchronize(self) -> None:
        self.link.wait_until(self.ready_s)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between the two recorded times."""
        return (end.ready_s - self.ready_s) * 1e3


class StreamContext:
    """Context that makes a stream the current one. Reusable, as SGLang keeps and re-enters it."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream
        self._outer: list[Stream] = []

    def __enter__(self) -> None:
        if self._stream is not None:
            self._outer.append(self._stream.link.stream)
            self._stream.link.stream = self._stream

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.link.stream = self._outer.pop()
