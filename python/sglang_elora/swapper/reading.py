"""Threads that read the files of adapters into host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from threading import Event

import torch

from sglang_elora.pages import AdapterImage, HostArena, HostBlocks, memory_outside

ReadImage = Callable[[Sequence[torch.Tensor]], AdapterImage]
"""Reads an adapter's file into memory that is given: uint8 ``[bytes]`` each, together as long as
the image. Runs in a thread; may raise."""


class Read(IntEnum):
    """How far a file has been read. What holds for all ranks is the least of theirs.

    ``UNDER_WAY`` is the least, so that a read is settled when it is over on all ranks: its memory
    is freed in the same step everywhere, and no rank waits for its reader.
    """

    UNDER_WAY = 0
    FAILED = 1
    CANCELLED = 2
    DONE = 3


class Reading:
    """One read, not yet settled.

    Args:
        num_bytes: Of the image.
        blocks: Where to; None: the reader takes memory outside the arena.
    """

    def __init__(
        self,
        executor: ThreadPoolExecutor,
        read: ReadImage,
        num_bytes: int,
        arena: HostArena,
        blocks: HostBlocks | None,
    ) -> None:
        self.blocks = blocks
        self._is_cancelled = Event()
        self._future: Future[AdapterImage | None] = executor.submit(
            self._run, read, num_bytes, arena
        )

    def cancel(self) -> None:
        """Do not read the file, if that has not begun."""
        self._is_cancelled.set()

    def resume(self) -> None:
        """Take ``cancel`` back; without effect once the reader has come to it."""
        self._is_cancelled.clear()

    @property
    def code(self) -> Read:
        """How far it is on this rank. Never waits."""
        if not self._future.done():
            return Read.UNDER_WAY
        if self._future.exception() is not None:
            return Read.FAILED
        return Read.CANCELLED if self._future.result() is None else Read.DONE

    @property
    def image(self) -> AdapterImage:
        """What was read, once ``code`` is ``DONE``."""
        image = self._future.result(timeout=0)
        assert image is not None, "the read was cancelled"
        return image

    @property
    def error(self) -> BaseException | None:
        """Why it failed on this rank, once it is over."""
        return self._future.exception(timeout=0)

    def _run(self, read: ReadImage, num_bytes: int, arena: HostArena) -> AdapterImage | None:
        if self._is_cancelled.is_set():
            return None
        if self.blocks is None:
            return read([memory_outside(arena, num_bytes)])
        return read(self.blocks.chunks)
