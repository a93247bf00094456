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
    """In flight, or over. ``pieces`` are ``(end layer, event behind it)`` in order of layers."""

    uid: str
    num_slots: int
    begun: StreamEvent  # before the first piece
    pieces: list[tuple[int, StreamEvent]] = field(default_factory=list)
    error: Exception | None = None
    started_s: float = field(default_factory=time.monotonic)

    @property
    def code(self) -> Copied:
        if self.error is not None:
            return Copied.FAILED
        return Copied.DONE if self.pieces[-1][1].query() else Copied.UNDER_WAY

    def seconds(self) -> float:
        """From the first piece to the last, once it is over; 0 where events cannot tell."""
        elapsed_ms = getattr(self.begun, "elapsed_time", None)
        return 0.0 if elapsed_ms is None else elapsed_ms(self.pieces[-1][1]) / 1e3

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
