"""Reads of adapters' files into host memory, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from threading import Event

import torch

from sglang_elora.pages import AdapterImage, HostArena, HostBlocks, memory_outside

ReadImage = Callable[[Sequence[torch.Tensor]], AdapterImage]
"""Reads an adapter's file into the given memory: uint8 tensors ``[bytes]``, in total as long as the
image. Runs in a thread; may raise."""


class Read(IntEnum):
    """Progress of a file read. The progress on all ranks is the minimum over the ranks.

    ``UNDER_WAY`` is the lowest, so that a read is settled once it has ended on all ranks: all ranks
    free its memory in the same step, and none blocks on its reader.
    """

    UNDER_WAY = 0
    FAILED = 1
    CANCELLED = 2
    DONE = 3


class Reading:
    """One read of a file, not yet settled.

    Args:
        num_bytes: Size of the image.
        blocks: Destination in the arena; None: the reader takes memory outside the arena.
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
        """Cancel the read, unless it has begun."""
        self._is_cancelled.set()

    def resume(self) -> None:
        """Undo ``cancel``; no effect once the reader has skipped the file."""
        self._is_cancelled.clear()

    @property
    def code(self) -> Read:
        """Progress on this rank. Never blocks."""
        if not self._future.done():
            return Read.UNDER_WAY
        if self._future.exception() is not None:
            return Read.FAILED
        return Read.CANCELLED if self._future.result() is None else Read.DONE

    @property
    def image(self) -> AdapterImage:
        """The image; only valid once ``code`` is ``DONE``."""
        image = self._future.result(timeout=0)
        assert image is not None, "the read was cancelled"
        return image

    @property
    def error(self) -> BaseException | None:
        """The error on this rank, None if there was none; only valid once the read has ended."""
        return self._future.exception(timeout=0)

    def _run(self, read: ReadImage, num_bytes: int, arena: HostArena) -> AdapterImage | None:
        if self._is_cancelled.is_set():
            return None
        if self.blocks is None:
            return read([memory_outside(arena, num_bytes)])
        return read(self.blocks.chunks)
