"""Adapters in host memory under a byte budget, and their own files below it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from threading import Event
from typing import Any

from sglang_elora.pages import AdapterImage
from sglang_elora.tree import LeafOrder

logger = logging.getLogger(__name__)

NUM_READERS = 2
"""Threads that read files. More of them take the interpreter from the scheduler."""


class HostTierFull(ValueError):
    """An adapter that came without a file does not fit into the budget."""


class Read(IntEnum):
    """How far a file has been read. What holds for all ranks is the least of theirs.

    While one rank still reads, no rank acts on the failure of another: to act on it would be to
    wait for the thread that reads.
    """

    UNDER_WAY = 0
    FAILED = 1
    CANCELLED = 2
    DONE = 3


@dataclass(slots=True, eq=False)
class _Entry:
    uid: str
    num_bytes: int
    read: Callable[[], AdapterImage] | None  # None: it came without a file
    image: AdapterImage | None = None
    num_holders: int = 0
    future: Future[AdapterImage | None] | None = None


class HostTier:
    """Images of one scheduler's adapters.

    An image is held while it is copied from. Others are dropped, the lowest first, when their sum
    is above the budget; one that is wanted at that moment stays, so that a budget smaller than one
    adapter costs a reading of its file per use and no more.

    Reads are asked for in one order on all tensor-parallel ranks and end in any. ``code`` tells
    how far one is here; ``settle`` acts on what the ranks have agreed on.

    Args:
        budget_bytes: Of all images together.
        priority: Of an adapter; what is lowest is dropped first, infinity is wanted now.
        on_moved: Told of an adapter that began to be read, came, or was dropped.
    """

    def __init__(
        self,
        budget_bytes: int,
        priority: Callable[[str], float],
        on_moved: Callable[[str], None] = lambda uid: None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._on_moved = on_moved
        self.num_bytes = 0
        self._num_images = 0
        self.num_reads = 0
        self.num_dropped = 0
        self._entries: dict[str, _Entry] = {}
        self._droppable: LeafOrder[str] = LeafOrder(priority)
        self._priority = priority
        self._reading: dict[str, Event] = {}  # set: nobody wants it any more
        self._never_read: dict[str, None] = {}  # in the order in which they were added
        self._executor: ThreadPoolExecutor | None = None

    def __contains__(self, uid: str) -> bool:
        """Whether its image is in host memory."""
        entry = self._entries.get(uid)
        return entry is not None and entry.image is not None

    def __len__(self) -> int:
        return self._num_images

    def is_reading(self, uid: str) -> bool:
        return uid in self._reading

    @property
    def reading(self) -> tuple[str, ...]:
        """Adapters whose files are being read, in the order in which they were asked for."""
        return tuple(self._reading)

    def add(
        self,
        uid: str,
        num_bytes: int,
        read: Callable[[], AdapterImage] | None = None,
        image: AdapterImage | None = None,
    ) -> None:
        """Make an adapter known, by its file or by an image that has none.

        Args:
            read: Reads the file. Runs in a thread; may raise.

        Raises:
            HostTierFull: The image has no file to be read again from, and does not fit beside
                others of its kind.
        """
        assert (read is None) != (image is None) and uid not in self._entries, uid
        if image is not None:
            fixed = sum(e.num_bytes for e in self._entries.values() if e.read is None)
            if fixed + num_bytes > self.budget_bytes:
                raise HostTierFull(
                    f"its {num_bytes} bytes have no file to be read again from, and --elora-host-gb"
                    f" leaves {self.budget_bytes - fixed} bytes for adapters of that kind: save it"
                    " as a folder, or raise --elora-host-gb"
                )
        self._entries[uid] = _Entry(uid, num_bytes, read)
        if image is None:
            self._never_read[uid] = None
        else:
            self._take_in(self._entries[uid], image)

    def remove(self, uid: str) -> None:
        """Forget an adapter. A read that is under way ends as cancelled."""
        entry = self._entries.pop(uid)
        self._never_read.pop(uid, None)
        self.cancel(uid)
        self._droppable.discard(uid)
        if entry.image is not None:
            self._num_images -= 1
            self.num_bytes -= entry.num_bytes
            self._on_moved(uid)

    def get(self, uid: str) -> AdapterImage:
        image = self._entries[uid].image
        assert image is not None, f"adapter {uid} is not in host memory"
        return image

    def request(self, uid: str) -> None:
        """Have its file read, unless it is there or under way."""
        entry = self._entries[uid]
        if entry.image is not None:
            return
        if uid in self._reading:
            self._reading[uid].clear()
            return
        assert entry.read is not None
        self._never_read.pop(uid, None)
        cancelled = self._reading[uid] = Event()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        entry.future = self._executor.submit(_read_unless, cancelled, entry.read)
        self._on_moved(uid)

    def read_ahead(self) -> None:
        """Have one file read that never was, while the budget has room for it."""
        uid = next(iter(self._never_read), None)
        if uid is not None and self.num_bytes + self._entries[uid].num_bytes <= self.budget_bytes:
            self.request(uid)

    def cancel(self, uid: str) -> None:
        """Do not start reading it, if that has not happened."""
        if uid in self._reading:
            self._reading[uid].set()

    def code(self, uid: str) -> Read:
        """How far the read is on this rank."""
        entry = self._entries.get(uid)
        if entry is None:
            return Read.CANCELLED
        assert entry.future is not None
        if not entry.future.done():
            return Read.UNDER_WAY
        if entry.future.exception() is not None:
            return Read.FAILED
        return Read.CANCELLED if entry.future.result() is None else Read.DONE

    def image_read(self, uid: str) -> AdapterImage | None:
        """The image of a read that is done on this rank; ``settle`` takes it in."""
        future = self._entries[uid].future if uid in self._entries else None
        is_done = future is not None and future.done() and future.exception() is None
        return future.result() if future is not None and is_done else None

    def settle(self, uid: str, code: Read) -> AdapterImage | BaseException | None:
        """Act on what all ranks have come to.

        Returns:
            The image if they all have it, else what went wrong here, or None.
        """
        if code == Read.UNDER_WAY:
            return None
        del self._reading[uid]
        entry = self._entries.get(uid)
        if entry is None:
            return None
        self._on_moved(uid)
        future, entry.future = entry.future, None
        assert future is not None
        self.num_reads += 1
        if code == Read.FAILED:
            return future.exception() or RuntimeError("another rank could not read it")
        image = future.result() if code == Read.DONE else None
        if image is not None:
            self._take_in(entry, image)
        return image

    def hold(self, uid: str) -> AdapterImage:
        """Keep the image until ``release``: it is copied from."""
        self._entries[uid].num_holders += 1
        self._droppable.discard(uid)
        return self.get(uid)

    def release(self, uid: str) -> None:
        entry = self._entries.get(uid)
        if entry is None:  # unloaded meanwhile
            return
        entry.num_holders -= 1
        if entry.num_holders == 0 and entry.image is not None and entry.read is not None:
            self._droppable.add(uid)

    def lower(self, uid: str) -> None:
        """Its priority fell."""
        self._droppable.lower(uid)

    def drop_surplus(self) -> None:
        """Bring the sum back under the budget, as far as nothing is held or wanted."""
        while self.num_bytes > self.budget_bytes:
            uid = self._droppable.take_lowest()
            if uid is None or self._priority(uid) == float("inf"):
                break
            self.drop(uid)
            self.num_dropped += 1
        self._droppable.give_back()

    def drop(self, uid: str) -> None:
        """Forget an image that nobody holds; the file is read again when it is asked for."""
        entry = self._entries[uid]
        assert entry.image is not None and entry.num_holders == 0 and entry.read is not None, uid
        self._droppable.discard(uid)
        entry.image = None
        self._num_images -= 1
        self.num_bytes -= entry.num_bytes
        self._on_moved(uid)

    def check_invariants(self) -> None:
        """Raises:
        AssertionError: The sum is not that of the images, or an image is in the wrong set.
        """
        present = [entry for entry in self._entries.values() if entry.image is not None]
        assert self.num_bytes == sum(entry.num_bytes for entry in present), self.num_bytes
        assert self._num_images == len(present), (self._num_images, len(present))
        droppable = {e.uid for e in present if e.num_holders == 0 and e.read is not None}
        assert self._droppable == droppable, (set(self._droppable), droppable)
        self._droppable.check_invariants()

    def _take_in(self, entry: _Entry, image: AdapterImage) -> None:
        entry.image = image
        self._num_images += 1
        self.num_bytes += entry.num_bytes
        if entry.read is not None and entry.num_holders == 0:
            self._droppable.add(entry.uid)


def _read_unless(cancelled: Event, read: Callable[[], Any]) -> Any:
    return None if cancelled.is_set() else read()
