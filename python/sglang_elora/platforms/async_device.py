"""A simulated device that runs stream operations as late, or as early, as CUDA may. For tests.

On the CPU platform an operation completes when it is issued, so a missing wait has no effect.
Here an operation that is passed to ``AsyncDevice.launch`` is deferred, and an ``Order`` decides
when it runs:

* ``LATEST``: copies run when something waits for them, and forward passes immediately. A batch that
  reads the target of a copy without waiting for it reads poison (NaN).
* ``EARLIEST``: copies run as soon as the operations that they wait for are complete, and forward
  passes when something waits for them. A copy that does not wait for a running batch overwrites
  the memory which that batch reads.
* ``RANDOM``: a seeded generator chooses one of both for each operation.

CUDA may choose any of these orders, so a different output, or a ``RaceError``, shows a missing
wait. Operations that are not passed to ``launch`` run immediately, as before.

An event may be polled instead of waited for: ``query`` returns False ``PATIENCE`` times and then
runs the recorded operations, so that a loop that only polls terminates.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from sglang_elora.platforms.race_check import (
    HOST,
    Access,
    Blocks,
    Clock,
    Footprint,
    RaceCheck,
    join,
)

PATIENCE = 3
"""Number of times ``Event.query`` returns False before it runs the event's operations."""


class Order(Enum):
    """When an operation runs, within the times that the events allow."""

    LATEST = "latest"
    EARLIEST = "earliest"
    RANDOM = "random"


@dataclass(eq=False, slots=True)
class Operation:
    """Work on a stream. The operations in ``after`` must complete before it."""

    stream: Stream
    run: Callable[[], None]
    footprint: Footprint
    after: list[Operation]
    eager: bool = False  # runs as soon as ``after`` allows
    is_forward: bool = False
    is_over: bool = False
    num_queries: int = 0
    busy_s: float = 0.0  # seconds that its stream has run operations for, up to its end


class AsyncDevice:
    """Streams, their pending operations, and the host's vector clock.

    Args:
        order: When operations run.
        seed: Seed for ``Order.RANDOM``.
    """

    def __init__(self, order: Order, seed: int = 0) -> None:
        self.order = order
        self.races = RaceCheck()
        self.host_clock: Clock = {}
        self.num_operations = 0
        self.num_delayed = 0  # operations still pending when ``launch`` returned
        self._random = random.Random(seed)
        self._num_streams = HOST
        self._running: list[Operation] = []
        self._pending: dict[Operation, None] = {}  # in the order of their launch
        self.stream = Stream(self)  # the current one

    def launch(
        self,
        kind: str,
        run: Callable[[], None],
        *,
        reads: Sequence[Access] = (),
        writes: Sequence[Access] = (),
        poison: Callable[[], None] | None = None,
        is_forward: bool = False,
    ) -> None:
        """Enqueue an operation on the current stream.

        Args:
            kind: Name of the operation in error texts.
            run: Executes the operation.
            reads: Memory that it reads.
            writes: Memory that it writes.
            poison: Overwrites its target with unusable values until it has run.
            is_forward: It is part of a forward pass; otherwise it is a copy.

        Raises:
            RaceError: It is not ordered after an earlier operation on the same memory.
        """
        stream = self.stream
        join(stream.clock, self.host_clock)
        stream.num_operations += 1
        stream.clock[stream.number] = stream.num_operations
        footprint = self.races.begin(
            stream.number, stream.num_operations, stream.clock, kind, reads, writes
        )
        after = [op for op in (stream.last, *stream.awaited) if op is not None and not op.is_over]
        eager = self._is_eager(is_forward)
        operation = Operation(stream, run, footprint, after, eager, is_forward)
        stream.awaited, stream.last = [], operation
        self.num_operations += 1
        if not stream.asynchronous:
            self.force(operation)
            return
        is_free = not any(  # operations of its own stream are ignored: they write other layers
            other.stream is not stream and other.footprint.touches(name, blocks).any()
            for other in self._pending
            for name, blocks in writes
        )
        self._pending[operation] = None
        if operation.eager:
            self._run_ready()
        if not operation.is_over:
            self.num_delayed += 1
            if poison is not None and is_free:
                poison()

    def force(self, operation: Operation | None) -> None:
        """Run an operation, and first all operations that must complete before it."""
        if operation is not None:
            self._run_with_what_it_awaits(operation)
            self._run_ready()

    def host_writes(self, kind: str, memory: str, blocks: Blocks) -> None:
        """Record that the host writes these slots now, or frees them for another writer.

        Raises:
            RaceError: The host has not waited for an operation that reads or writes them.
        """
        self.host_clock[HOST] = self.host_clock.get(HOST, 0) + 1
        made = self.races.begin(
            HOST, self.host_clock[HOST], self.host_clock, kind, (), [(memory, blocks)]
        )
        self.races.end(made)

    def idle(self, memory: str, blocks: Blocks) -> Blocks:
        """Those of ``blocks`` that no pending operation accesses."""
        busy = np.zeros(len(blocks), np.bool_)
        for operation in self._pending:
            busy |= operation.footprint.touches(memory, blocks)
        return blocks[~busy]

    def synchronize(self, _device: Any = None) -> None:
        """Let the host wait for all pending operations."""
        for operation in list(self._pending):
            self.force(operation)
            join(self.host_clock, operation.footprint.clock)

    def install(self, device_module: Any) -> None:
        """Replace the streams and events of ``device_module`` (torch.cpu) by these."""
        device_module.Stream = functools.partial(Stream, self)
        device_module.Event = functools.partial(Event, self)
        device_module.StreamContext = StreamContext
        device_module.stream = StreamContext
        device_module.current_stream = lambda device=None: self.stream
        device_module.synchronize = self.synchronize

    def new_number(self) -> int:
        self._num_streams += 1
        return self._num_streams

    def running_on(self, stream: Stream) -> Operation | None:
        """The operation being executed, if it is on this stream; otherwise None."""
        top = self._running[-1] if self._running else None
        return top if top is not None and top.stream is stream else None

    def _is_eager(self, is_forward: bool) -> bool:
        if self.order is Order.RANDOM:
            return self._random.random() < 0.5
        return is_forward == (self.order is Order.LATEST)

    def _run_ready(self) -> None:
        """Run eager operations: forward passes with their dependencies, copies without pending
        ones."""
        if self._running:  # inside a forward pass: only these wait for events while they run
            return
        for operation in [op for op in self._pending if op.eager]:
            if operation.is_forward:
                self._run_with_what_it_awaits(operation)
            elif not operation.is_over and all(op.is_over for op in operation.after):
                self._run(operation)

    def _run_with_what_it_awaits(self, operation: Operation) -> None:
        todo = [operation]
        while todo:
            before = [op for op in todo[-1].after if not op.is_over]
            if before:
                todo += before
                continue
            if not (top := todo.pop()).is_over:
                self._run(top)

    def _run(self, operation: Operation) -> None:
        self._pending.pop(operation, None)
        outer, self.stream = self.stream, operation.stream
        self._running.append(operation)
        begun_s = time.perf_counter()
        try:
            operation.run()
        except Exception:
            self.races.end(operation.footprint)  # a race (poisoned input) may have caused the error
            raise
        finally:
            self._running.pop()
            self.stream = outer
            operation.stream.busy_s += time.perf_counter() - begun_s
            operation.busy_s = operation.stream.busy_s
            operation.is_over = True
            operation.after = []
        self.races.end(operation.footprint)


class Stream:
    """A stream. Its owner sets ``asynchronous`` if all its operations are passed to ``launch``."""

    def __init__(self, device: AsyncDevice, _device: Any = None, priority: int = -1) -> None:
        self.device_ = device
        self.number = device.new_number()
        self.asynchronous = False
        self.clock: Clock = {}
        self.num_operations = 0
        self.busy_s = 0.0
        self.last: Operation | None = None
        self.awaited: list[Operation] = []

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)
        running = self.device_.running_on(self)
        if running is not None:
            join(running.footprint.clock, event.clock)
        if event.operation is None or event.operation.is_over:
            return
        if running is None and self.asynchronous:
            self.awaited = [op for op in self.awaited if not op.is_over] + [event.operation]
        else:
            self.device_.force(event.operation)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.device_)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().query()


class Event:
    """The completion of the work enqueued on a stream so far."""

    def __init__(self, device: AsyncDevice, enable_timing: bool = False) -> None:
        self.device_ = device
        self.operation: Operation | None = None
        self.clock: Clock = {}
        self._last: Operation | None = None  # of the stream

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.device_.stream
        if not stream.asynchronous:  # the host itself executes its operations
            join(stream.clock, self.device_.host_clock)
        self.clock = dict(stream.clock)
        self.operation = self._last = stream.last
        for awaited in stream.awaited:  # the stream's next operation would wait for these
            if self.operation is None or self.operation.is_over:
                self.operation = awaited
            elif not awaited.is_over:
                self.operation = _both(self.device_, stream, self.operation, awaited)

    def query(self) -> bool:
        operation = self.operation
        if operation is not None and not operation.is_over:
            operation.num_queries += 1
            if operation.num_queries <= PATIENCE:
                return False
            self.device_.force(operation)
        join(self.device_.host_clock, self.clock)
        return True

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.device_.stream).wait_event(self)

    def synchronize(self) -> None:
        self.device_.force(self.operation)
        join(self.device_.host_clock, self.clock)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds for which the stream ran operations between two events recorded on it.

        Time for which an operation was pending is not included, unlike CUDA's.

        Raises:
            RuntimeError: The stream has not yet run all of them.
        """
        return (end._busy_s() - self._busy_s()) * 1e3

    def _busy_s(self) -> float:
        if self._last is None:
            return 0.0
        if not self._last.is_over:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return self._last.busy_s


def _both(device: AsyncDevice, stream: Stream, one: Operation, other: Operation) -> Operation:
    """An empty operation that completes after both."""
    footprint = Footprint(0, stream.number, 0, "", "", {})
    return Operation(stream, lambda: None, footprint, [one, other])


class StreamContext:
    """Context that makes a stream the current one. Reusable, as SGLang keeps and re-enters it."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream
        self._outer: list[Stream] = []

    def __enter__(self) -> None:
        if self._stream is not None:
            device = self._stream.device_
            self._outer.append(device.stream)
            device.stream = self._stream

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.device_.stream = self._outer.pop()
