"""A happens-before check that finds unordered operations on the same memory.

Each stream and the host has a vector clock, as in ``torch.cuda._sanitizer``: an event has the clock
of the stream it was recorded on, waiting for it joins that clock, and launching an operation joins
the host's. Two operations on the same memory, of which at least one writes, race unless the clock
of the later one covers the earlier one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

HOST = 0
"""The host's stream number."""

_SITE_FRAMES = 7
_OWN_FILES = ("race_check.py", "async_device.py", "stream_check.py")

Clock = dict[int, int]
"""Stream number -> number of its operations that are known to be complete."""

Blocks = NDArray[np.int64]
"""Numbers of the slots that an operation accesses."""

Access = tuple[str, Blocks]
"""An access: (name of a memory, slots in it)."""


class RaceError(AssertionError):
    """Two operations access the same memory without an order between them."""


@dataclass(slots=True)
class Footprint:
    """The memory that one operation accesses, and earlier operations on the same memory.

    ``clock`` is its stream's at the launch; the clocks of events that it waits for while it runs
    are joined later.
    """

    number: int
    stream: int
    epoch: int
    kind: str
    site: str
    clock: Clock
    reads: Sequence[Access] = ()
    writes: Sequence[Access] = ()
    earlier: set[tuple[int, str]] = field(default_factory=set)  # (operation, what both did)

    def touches(self, memory: str, blocks: Blocks) -> NDArray[np.bool_]:
        """Mask of those of ``blocks`` that the operation reads or writes."""
        found = np.zeros(len(blocks), np.bool_)
        for name, own in (*self.reads, *self.writes):
            if name == memory:
                found |= np.isin(blocks, own)
        return found


@dataclass(slots=True)
class _Memory:
    """Per slot, the last operation that wrote it and, per stream, the last one that read it."""

    written_by: Blocks
    read_by: dict[int, Blocks] = field(default_factory=dict)


def join(clock: Clock, other: Clock) -> None:
    """Extend ``clock`` to cover all operations that ``other`` covers."""
    for stream, epoch in other.items():
        if clock.get(stream, 0) < epoch:
            clock[stream] = epoch


class RaceCheck:
    """Checker of all operations since the start; ``num_checked`` counts compared pairs."""

    def __init__(self) -> None:
        self._done: list[tuple[int, int, str, str]] = [(HOST, 0, "", "")]  # by number
        self._memories: dict[str, _Memory] = {}
        self.num_checked = 0

    def begin(
        self,
        stream: int,
        epoch: int,
        clock: Clock,
        kind: str,
        reads: Sequence[Access],
        writes: Sequence[Access],
    ) -> Footprint:
        """Record an operation launched now; returns it with the earlier ones it must follow."""
        site = call_site()
        made = Footprint(len(self._done), stream, epoch, kind, site, dict(clock), reads, writes)
        self._done.append((stream, epoch, kind, site))
        for name, blocks in reads:
            memory = self._memory(name, blocks)
            _add(made.earlier, memory.written_by[blocks], f"reads {name} that it wrote")
        for name, blocks in writes:
            memory = self._memory(name, blocks)
            _add(made.earlier, memory.written_by[blocks], f"writes {name} that it wrote")
            for readers in memory.read_by.values():
                _add(made.earlier, readers[blocks], f"writes {name} that it read")
        for name, blocks in reads:
            memory = self._memory(name, blocks)
            if stream not in memory.read_by:
                memory.read_by[stream] = np.zeros(len(memory.written_by), np.int64)
            memory.read_by[stream][blocks] = made.number
        for name, blocks in writes:
            self._memory(name, blocks).written_by[blocks] = made.number
        return made

    def end(self, made: Footprint) -> None:
        """Check an operation whose clock is final, as it has no more events to wait for.

        Raises:
            RaceError: It is not ordered after an earlier operation on the same memory. The text
                has the call sites of both.
        """
        for number, both in sorted(made.earlier):
            stream, epoch, kind, site = self._done[number]
            self.num_checked += 1
            if stream != made.stream and made.clock.get(stream, 0) < epoch:
                raise RaceError(
                    f"nothing orders a {made.kind} (operation {made.number}) after a {kind} "
                    f"(operation {number} of {len(self._done) - 1}), and it {both}.\n"
                    f"  {made.kind}: {made.site}\n  {kind}: {site}"
                )

    def _memory(self, name: str, blocks: Blocks) -> _Memory:
        size = int(blocks.max(initial=0)) + 1
        memory = self._memories.get(name)
        if memory is None:
            memory = self._memories[name] = _Memory(np.zeros(size, np.int64))
        grown = max(size, 2 * len(memory.written_by))
        if size > len(memory.written_by):
            memory.written_by = _resized(memory.written_by, grown)
            memory.read_by = {s: _resized(a, grown) for s, a in memory.read_by.items()}
        return memory


def call_site() -> str:
    """The innermost SGLang and ELORA frames outside the check itself, innermost first."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < _SITE_FRAMES:
        path = frame.f_code.co_filename
        if not path.endswith(_OWN_FILES) and "sglang" in path:
            name = path.rsplit("site-packages/", 1)[-1].rsplit("/python/", 1)[-1]
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


def _add(earlier: set[tuple[int, str]], numbers: Blocks, both: str) -> None:
    earlier.update((int(number), both) for number in np.unique(numbers) if number)


def _resized(array: Blocks, size: int) -> Blocks:
    bigger = np.zeros(size, np.int64)
    bigger[: len(array)] = array
    return bigger
