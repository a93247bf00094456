"""The copy of one adapter from host memory into its slots, concurrent with the computation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol


class StreamEvent(Protocol):
    """The part of the ``torch.cuda.Event`` interface that is used here."""

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


class Copied(IntEnum):
    """Progress of a copy. The progress on all ranks is the minimum over the ranks."""

    FAILED = 0
    UNDER_WAY = 1
    DONE = 2


@dataclass(slots=True)
class AdapterCopy:
    """The copy of one adapter, in progress or finished.

    ``pieces`` are ``(end layer, event recorded after the piece)``, in the order of layers.
    """

    adapter_id: str
    num_slots: int
    begun: StreamEvent | None = None  # recorded before the first transfer
    wait_for_slots: tuple[StreamEvent, StreamEvent] | None = None  # begin and end of that wait
    pieces: list[tuple[int, StreamEvent]] = field(default_factory=list)
    error: Exception | None = None
    confirmed: bool = False  # every rank has queued it; a batch may use it only then
    launches_before: int = 0  # batches launched before it was started; set by its owner
    started_s: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> Copied:
        if self.error is not None:
            return Copied.FAILED
        return Copied.DONE if self.pieces[-1][1].query() else Copied.UNDER_WAY

    def seconds(self) -> float:
        """Seconds that the link took for a finished copy; 0 if events cannot be timed.

        The first piece is copied to the staging buffer before the copy waits for its slots, all
        others after that. The wait (for the running batch) is not included.
        """
        begun, wait = self.begun, self.wait_for_slots
        if begun is None or wait is None or not hasattr(begun, "elapsed_time"):
            return 0.0
        arrived, ordered = wait
        return _elapsed_s(begun, arrived) + _elapsed_s(ordered, self.pieces[-1][1])

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait for this layer's weights. Does not block the host."""
        for end, event in self.pieces:
            if layer < end:
                event.wait()
                return

    def wait(self) -> None:
        """As ``wait_layer``, for the weights of all layers."""
        self.pieces[-1][1].wait()

    def synchronize(self) -> None:
        """Block the host until the copy has finished."""
        for _, event in self.pieces:
            event.synchronize()


def _elapsed_s(begin: Any, end: StreamEvent) -> float:
    elapsed_ms: float = begin.elapsed_time(end)
    return elapsed_ms / 1e3
