"""Adapters in the host memory of a simulated server, and the reads of their files."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection

from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.swapper.idle_images import NUM_READERS, IdleImages


class Images:
    """The adapters in host memory; like ``swapper/host_tier.py``, in slots instead of blocks.

    If ``calibration.adapter_host_slots`` is 0, all adapters are in host memory from the start.
    """

    def __init__(self, cache: Cache, calibration: Calibration) -> None:
        self._cache, self._calibration = cache, calibration
        self._free = calibration.adapter_host_slots
        self._holds_all = calibration.adapter_host_slots == 0
        self._present: dict[str, int] = {}  # adapter -> number of copies that read from it
        self._reads: dict[str, float] = {}  # adapter -> end of its read
        self._readers_free_s = [0.0] * NUM_READERS
        self._never_read = OrderedDict.fromkeys(str(a.adapter_id) for a in cache.adapter_table)
        self._is_denied = False  # an adapter had to wait for memory in this step
        self._idle = IdleImages(self._priority, cache.adapter_table.image_position)

    def __contains__(self, adapter_id: str) -> bool:
        return self._holds_all or adapter_id in self._present

    @property
    def reading(self) -> Collection[str]:
        return self._reads.keys()

    @property
    def next_s(self) -> float:
        """The time at which the next read ends."""
        return min(self._reads.values(), default=math.inf)

    def settle(self, now_s: float) -> None:
        """Complete the reads that have ended by now; called at the start of a scheduler step."""
        self._is_denied = False
        for adapter_id in [a for a, end_s in self._reads.items() if end_s <= now_s]:
            del self._reads[adapter_id]
            self._present[adapter_id] = 0
            self._idle.add(adapter_id, self._cache.adapter(adapter_id).num_slots)

    def read(self, adapter_id: str, now_s: float) -> None:
        """Start reading an adapter's file, if it fits after dropping idle adapters."""
        if adapter_id in self._present or adapter_id in self._reads or self._is_denied:
            return
        num_slots = self._cache.adapter(adapter_id).num_slots
        position = self._cache.adapter_table.image_position(adapter_id)
        if not self._make_room(num_slots, position):
            self._is_denied = position < math.inf
            return
        self._free -= num_slots
        self._never_read.pop(adapter_id, None)
        reader = min(range(NUM_READERS), key=self._readers_free_s.__getitem__)
        took_s = self._calibration.read_s(num_slots)
        self._readers_free_s[reader] = max(now_s, self._readers_free_s[reader]) + took_s
        self._reads[adapter_id] = self._readers_free_s[reader]

    def read_first(self, adapter_id: str) -> None:
        """Read this adapter's file next, if it has never been read and there is time."""
        if adapter_id in self._never_read:
            self._never_read.move_to_end(adapter_id, last=False)

    def read_ahead(self, now_s: float) -> None:
        """Start reading one file that has never been read, if it fits."""
        adapter_id = None if self._holds_all else next(iter(self._never_read), None)
        if adapter_id is not None:
            self.read(adapter_id, now_s)

    def hold(self, adapter_id: str) -> None:
        """Keep an adapter in host memory while it is copied to the device."""
        if not self._holds_all:
            self._present[adapter_id] += 1
            self._idle.discard(adapter_id)

    def release(self, adapter_id: str) -> None:
        """End ``hold``: the copy is complete."""
        if not self._holds_all:
            self._present[adapter_id] -= 1
            if not self._present[adapter_id]:
                self._idle.add(adapter_id, self._cache.adapter(adapter_id).num_slots)

    def lower(self, adapter_id: str) -> None:
        """Lower the adapter's priority, as no queued request needs it any longer."""
        self._idle.lower(adapter_id)

    def _make_room(self, num_slots: int, position: float) -> bool:
        missing = num_slots - self._free
        victims = self._idle.victims(missing, position) if missing > 0 else []
        for adapter_id in victims or ():
            self._idle.discard(adapter_id)
            del self._present[adapter_id]
            self._free += self._cache.adapter(adapter_id).num_slots
        return victims is not None

    def _priority(self, adapter_id: str) -> float:
        return self._cache.orders.image_priority(self._cache.adapter_table.get(adapter_id).entry)
