"""The host tier of adapters: images in host memory under a byte budget, read from their files."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sglang_elora.pages import AdapterImage, HostArena, HostBlocks
from sglang_elora.swapper.idle_images import NUM_READERS, IdleImages
from sglang_elora.swapper.reading import Read, ReadImage, Reading

logger = logging.getLogger(__name__)

MOST_OUTSIDE = NUM_READERS
"""Most images outside the arena at a time, of adapters too large for it. More of them use more
memory beyond the budget."""


class HostTierFull(ValueError):
    """The image of an adapter without a file does not fit into the budget."""


@dataclass(slots=True, eq=False)
class _Entry:
    adapter_id: str
    num_bytes: int
    read: ReadImage | None  # None: it has no file
    image: AdapterImage | None = None
    blocks: HostBlocks | None = None  # memory of the image; None: outside the arena
    num_holders: int = 0


class HostTier:
    """The images of one scheduler's adapters.

    Images lie in blocks of the arena, whose size is the budget. Blocks are reserved when a read is
    requested, so reads in progress count too, and a reader never waits for memory. If too few
    blocks are free, idle images are dropped for a queued request's adapter: first those that no
    queued request needs, in the order of ``priority``, then those of later requests in the queue.
    If that is not enough, because other images are being copied from or read into, the read is not
    started, and ``request`` is called again in the next step. Until then no read is started for
    later requests, so the first queued request always gets its adapter eventually.

    An adapter that does not fit into the arena (any adapter, with a budget of 0) is read into
    ordinary memory outside of it, at most ``MOST_OUTSIDE`` at a time, and dropped once it has been
    copied. Its file is then read for each use, and the device copies from memory that is not
    page-locked.

    Reads are requested in the same order on all tensor-parallel ranks and end in any order.
    ``code`` is the progress on this rank; ``settle`` acts on the progress that the ranks agreed on.
    Free blocks, drops and started reads depend on nothing else, so they are equal on all ranks.

    Args:
        arena: The memory of the images.
        priority: Of an adapter; the idle image of lowest priority is dropped first. Infinity while
            a queued request needs the adapter.
        queue_position: Position of the first queued request that needs the image; infinity if none
            does.
        on_moved: Called with the id of an adapter whose read starts or ends, or whose image is
            dropped.
    """

    def __init__(
        self,
        arena: HostArena,
        priority: Callable[[str], float],
        queue_position: Callable[[str], float] = lambda adapter_id: math.inf,
        on_moved: Callable[[str], None] = lambda adapter_id: None,
    ) -> None:
        self.arena = arena
        self._on_moved = on_moved
        self.num_bytes = 0
        self._num_images = 0
        self.num_reads = 0
        self.num_dropped = 0
        self.num_outside = 0  # images so far that were read outside the arena
        self._entries: dict[str, _Entry] = {}
        self._removed: dict[str, _Entry] = {}  # unloaded, but a copy still reads the image
        self._idle = IdleImages(priority, queue_position)
        self._queue_position = queue_position
        self._reading: dict[str, tuple[_Entry, Reading]] = {}
        self._outside: dict[str, None] = {}  # with a file, read or being read outside the arena
        self._sent_blocks = 0  # blocks that adapters without files take or wait for
        self._sent_outside: dict[str, None] = {}  # adapters without files that wait for blocks
        self._never_read: OrderedDict[str, None] = OrderedDict()  # the next one to read first
        self._is_denied = False  # an adapter had to wait for memory in this step
        self._executor: ThreadPoolExecutor | None = None

    def __contains__(self, adapter_id: str) -> bool:
        """Whether its image is in host memory."""
        entry = self._entries.get(adapter_id)
        return entry is not None and entry.image is not None

    def __len__(self) -> int:
        return self._num_images

    def is_reading(self, adapter_id: str) -> bool:
        return adapter_id in self._reading

    @property
    def reading(self) -> tuple[str, ...]:
        """Adapters whose files are being read, in the order of the requests."""
        return tuple(self._reading)

    def add(
        self,
        adapter_id: str,
        num_bytes: int,
        read: ReadImage | None = None,
        image: AdapterImage | None = None,
    ) -> None:
        """Add an adapter, either with a file (``read``) or with an image without one (``image``),
        which is copied into the arena.

        Raises:
            HostTierFull: The image has no file to read it from again, and does not fit in addition
                to the other images without a file.
        """
        assert (read is None) != (image is None) and adapter_id not in self._entries, adapter_id
        assert adapter_id not in self._removed and adapter_id not in self._reading, adapter_id
        if image is None:
            self._entries[adapter_id] = _Entry(adapter_id, num_bytes, read)
            self._never_read[adapter_id] = None
            return
        left = self.arena.num_blocks - self._sent_blocks
        if self.arena.blocks_for(num_bytes) > left:
            raise HostTierFull(
                f"its {num_bytes} bytes have no file to be read again from, and --elora-host-gb"
                f" leaves {left * self.arena.block_bytes} bytes for adapters of that kind: save it"
                " as a folder, or raise --elora-host-gb"
            )
        self._sent_blocks += self.arena.blocks_for(num_bytes)
        entry = self._entries[adapter_id] = _Entry(adapter_id, num_bytes, None)
        self._sent_outside[adapter_id] = None
        self._take_in(entry, image, None)
        self._house_sent()

    def remove(self, adapter_id: str) -> None:
        """Remove an adapter. A read in progress ends as cancelled."""
        entry = self._entries.pop(adapter_id)
        self._never_read.pop(adapter_id, None)
        self._sent_outside.pop(adapter_id, None)
        self.cancel(adapter_id)
        if entry.read is None:
            self._sent_blocks -= self.arena.blocks_for(entry.num_bytes)
        if entry.image is not None:
            if entry.num_holders:
                self._removed[adapter_id] = entry
            else:
                self._idle.discard(adapter_id)
                self._free(entry)
            self._num_images -= 1
            self.num_bytes -= entry.num_bytes
            self._on_moved(adapter_id)

    def get(self, adapter_id: str) -> AdapterImage:
        image = self._entries[adapter_id].image
        assert image is not None, f"adapter {adapter_id} is not in host memory"
        return image

    def request(self, adapter_id: str) -> None:
        """Start to read the adapter's file, unless its image is present, being read, or has no room
        yet.

        For an adapter that no queued request needs, only free blocks count as room.
        """
        entry = self._entries[adapter_id]
        if entry.image is not None:
            return
        if adapter_id in self._reading:
            self._reading[adapter_id][1].resume()
            return
        if self._is_denied or self._sent_outside:
            return
        position = self._queue_position(adapter_id)
        has_room, blocks = self._reserve(entry, position)
        if not has_room:
            self._is_denied = position < math.inf
            return
        assert entry.read is not None
        self._never_read.pop(adapter_id, None)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="adapter-reader")
        reading = Reading(self._executor, entry.read, entry.num_bytes, self.arena, blocks)
        self._reading[adapter_id] = entry, reading
        self._on_moved(adapter_id)

    def read_first(self, adapter_id: str) -> None:
        """Read this adapter's file next, if it was never read and nothing else is to be done."""
        if adapter_id in self._never_read:
            self._never_read.move_to_end(adapter_id, last=False)

    def read_ahead(self) -> None:
        """Start to read one file that was never read, if the budget has room for it."""
        adapter_id = next(iter(self._never_read), None)
        if adapter_id is not None:
            self.request(adapter_id)

    def cancel(self, adapter_id: str) -> None:
        """Cancel the adapter's read, unless the reader has begun."""
        if adapter_id in self._reading:
            self._reading[adapter_id][1].cancel()

    def code(self, adapter_id: str) -> Read:
        """Progress of the read on this rank."""
        entry, reading = self._reading[adapter_id]
        code = reading.code
        is_known = self._entries.get(adapter_id) is entry
        return code if is_known else min(code, Read.CANCELLED)

    def image_read(self, adapter_id: str) -> AdapterImage | None:
        """The image of a read that is done on this rank but not settled; otherwise None."""
        return self._reading[adapter_id][1].image if self.code(adapter_id) == Read.DONE else None

    def settle(self, adapter_id: str, code: Read) -> AdapterImage | BaseException | None:
        """Complete a read, given the progress that all ranks agreed on.

        Returns:
            The image if all ranks have it, the error if one failed, otherwise None.
        """
        if code == Read.UNDER_WAY:
            return None
        entry, reading = self._reading.pop(adapter_id)
        is_known = self._entries.get(adapter_id) is entry
        self.num_reads += is_known
        if is_known and code == Read.DONE:
            self._take_in(entry, reading.image, reading.blocks)
            self._on_moved(adapter_id)
            return entry.image
        if reading.blocks is None:
            del self._outside[adapter_id]
        else:
            self.arena.give_back(reading.blocks)
        if not is_known:
            return None
        self._on_moved(adapter_id)
        if code == Read.FAILED:
            return reading.error or RuntimeError("another rank could not read it")
        return None

    def hold(self, adapter_id: str) -> AdapterImage:
        """Keep the image until ``release``, because a copy reads it."""
        entry = self._entries[adapter_id]
        entry.num_holders += 1
        self._idle.discard(adapter_id)
        return self.get(adapter_id)

    def is_held(self, adapter_id: str) -> bool:
        """Whether a copy holds the image. Also True for an unknown (removed) adapter."""
        entry = self._entries.get(adapter_id) or self._removed.get(adapter_id)
        return entry is None or entry.num_holders > 0

    def release(self, adapter_id: str) -> None:
        """End a ``hold``: the copy on this rank no longer reads the image."""
        entry = self._entries.get(adapter_id) or self._removed.get(adapter_id)
        if entry is None:  # unloaded in the meantime
            return
        entry.num_holders -= 1
        if entry.num_holders:
            return
        if self._removed.pop(adapter_id, None) is not None:
            self._free(entry)
        elif entry.read is not None:
            self._idle.add(adapter_id, _num_blocks(entry))

    def lower(self, adapter_id: str) -> None:
        """Record that the adapter's priority fell."""
        self._idle.lower(adapter_id)

    def drop_surplus(self) -> None:
        """End a step: drop images outside the arena that no queued request needs."""
        self._is_denied = False
        for adapter_id in [adapter_id for adapter_id in self._outside if adapter_id in self._idle]:
            if self._queue_position(adapter_id) == math.inf:
                self._drop_idle(adapter_id)
        self._house_sent()

    def drop(self, adapter_id: str) -> None:
        """Drop an image that no copy holds; a later ``request`` reads the file again."""
        entry = self._entries[adapter_id]
        assert entry.image is not None and entry.num_holders == 0 and entry.read is not None, (
            adapter_id
        )
        self._idle.discard(adapter_id)
        self._free(entry)
        self._num_images -= 1
        self.num_bytes -= entry.num_bytes
        self._on_moved(adapter_id)

    def check_invariants(self) -> None:
        """Raises:
        AssertionError: A sum differs from that over the images, an image is in the wrong set,
            or blocks of the arena are lost.
        """
        present = [entry for entry in self._entries.values() if entry.image is not None]
        assert self.num_bytes == sum(entry.num_bytes for entry in present), self.num_bytes
        assert self._num_images == len(present), (self._num_images, len(present))
        idle = [e for e in present if e.num_holders == 0 and e.read is not None]
        self._idle.check_invariants({e.adapter_id: _num_blocks(e) for e in idle})
        sent = [entry for entry in present if entry.read is None]
        assert self._sent_blocks == sum(self.arena.blocks_for(e.num_bytes) for e in sent)
        assert self._sent_outside.keys() == {e.adapter_id for e in sent if e.blocks is None}
        files = [e for e in [*present, *self._removed.values()] if e.read is not None]
        outside = {e.adapter_id for e in files if e.blocks is None}
        outside |= {
            adapter_id
            for adapter_id, (_, reading) in self._reading.items()
            if reading.blocks is None
        }
        assert self._outside.keys() == outside, (self._outside, outside)
        held = sum(map(_num_blocks, [*present, *self._removed.values()]))
        held += sum(r.blocks.num_blocks for _, r in self._reading.values() if r.blocks is not None)
        assert held == self.arena.num_blocks - self.arena.num_free, (held, self.arena.num_free)
        self.arena.check_invariants()

    def _take_in(self, entry: _Entry, image: AdapterImage, blocks: HostBlocks | None) -> None:
        entry.image, entry.blocks = image, blocks
        self._num_images += 1
        self.num_bytes += entry.num_bytes
        if entry.read is not None:
            self._idle.add(entry.adapter_id, _num_blocks(entry))

    def _free(self, entry: _Entry) -> None:
        entry.image = None
        if entry.blocks is None:
            self._outside.pop(entry.adapter_id, None)
        else:
            self.arena.give_back(entry.blocks)
            entry.blocks = None

    def _reserve(self, entry: _Entry, position: float) -> tuple[bool, HostBlocks | None]:
        """Whether the file may be read now, and the blocks for it (None: outside the arena)."""
        num_blocks = self.arena.blocks_for(entry.num_bytes)
        if num_blocks > self.arena.num_blocks - self._sent_blocks:
            return self._reserve_outside(entry, position), None
        if not self._make_room(num_blocks, position):
            return False, None
        return True, self.arena.take(entry.num_bytes)

    def _reserve_outside(self, entry: _Entry, position: float) -> bool:
        if position == math.inf:
            return False
        if len(self._outside) >= MOST_OUTSIDE:
            last = self._idle.last_of(self._outside, position)
            if last is None:
                return False
            self._drop_idle(last)
        if not self.num_outside:
            logger.warning(
                "--elora-host-gb has no room for an adapter of %d bytes: its like are read from "
                "their files for each use, and copied from memory that is not page-locked",
                entry.num_bytes,
            )
        self.num_outside += 1
        self._outside[entry.adapter_id] = None
        return True

    def _make_room(self, num_blocks: int, position: float) -> bool:
        """Free ``num_blocks`` blocks by dropping idle images that no request at this or an earlier
        position needs; if that is not enough, drop nothing. Returns whether they are free."""
        missing = num_blocks - self.arena.num_free
        if missing <= 0:
            return True
        victims = self._idle.victims(missing, position)
        for adapter_id in victims or ():
            self._drop_idle(adapter_id)
        return victims is not None

    def _drop_idle(self, adapter_id: str) -> None:
        self.drop(adapter_id)
        self.num_dropped += 1

    def _house_sent(self) -> None:
        """Move images without a file into the arena, as far as their blocks can be freed."""
        for adapter_id in [*self._sent_outside]:
            entry = self._entries[adapter_id]
            num_blocks = self.arena.blocks_for(entry.num_bytes)
            if entry.num_holders or not self._make_room(num_blocks, position=-1):
                return
            entry.blocks = self.arena.take(entry.num_bytes)
            assert entry.image is not None and entry.blocks is not None, adapter_id
            entry.image = entry.image.copied_to(entry.blocks.chunks)
            del self._sent_outside[adapter_id]


def _num_blocks(entry: _Entry) -> int:
    return 0 if entry.blocks is None else entry.blocks.num_blocks
