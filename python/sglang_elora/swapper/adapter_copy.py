"""The copy of one adapter from host memory into its slots, on a stream beside the computation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol


class StreamEvent(Protocol):
    """What is used of ``torch.cuda.Event`` and its likes."""

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class Copied(IntEnum):
    """How far a copy is. What holds for all ranks is the least of theirs."""

    FAILED = 0
    UNDER_WAY = 1
    DONE = 2


@dataclass(slots=True)
class AdapterCopy:
    """The copy of one adapter, under way or over.

    ``pieces`` are ``(end layer, event after it)``, in the order of layers.
    """

    adapter_id: str
    num_slots: int
    begun: StreamEvent | None = None  # before the first transfer
    wait_for_slots: tuple[StreamEvent, StreamEvent] | None = None  # its begin and its end
    pieces: list[tuple[int, StreamEvent]] = field(default_factory=list)
    error: Exception | None = None
    confirmed: bool = False  # every rank has queued it: only then may a batch run with it
    launches_before: int = 0  # batches launched before it was started; set by its owner
    started_s: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> Copied:
        if self.error is not None:
            return Copied.FAILED
        return Copied.DONE if self.pieces[-1][1].query() else Copied.UNDER_WAY

    def seconds(self) -> float:
        """Time that the link took for all bytes of a finished copy; 0 where events have no time.

        The first piece goes to the staging buffer before the copy waits for its slots, everything
        else after that. The wait itself is the rest of the batch under way, and does not count.
        """
        begun, wait = self.begun, self.wait_for_slots
        if begun is None or wait is None or not hasattr(begun, "elapsed_time"):
            return 0.0
        arrived, ordered = wait
        return _elapsed_s(begun, arrived) + _elapsed_s(ordered, self.pieces[-1][1])

    def wait_layer(self, layer: int) -> None:
        """Work put on the current stream from now on sees this layer's weights."""
        for end, event in self.pieces:
            if layer < end:
                event.wait()
                return

    def wait(self) -> None:
        """As ``wait_layer``, for all layers."""
        self.pieces[-1][1].wait()

    def synchronize(self) -> None:
        """Block until nothing of it is under way."""
        for _, event in self.pieces:
            event.synchronize()


def _elapsed_s(begin: Any, end: StreamEvent) -> float:
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms / 1e3
