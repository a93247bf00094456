"""A plugin that removes one wait between streams, or one pin: MISSING_WAIT names the function."""

from __future__ import annotations

import os


def no_wait_before_slots():
    from sglang_elora.srt.mem_cache.free_order import FreeOrder

    FreeOrder.wait = lambda self, stream: None


def no_wait_for_a_layer():
    from sglang_elora.swapper.adapter_copy import AdapterCopy

    AdapterCopy.wait_layer = lambda self, layer: None


def event_before_its_copy():
    from sglang_elora.srt.mem_cache.copy_stream import CopyStream

    original = CopyStream._queue

    def queue(self, copy, image, slots):
        paged = original(self, copy, image, slots)
        ends, events = zip(*copy.pieces, strict=True)
        copy.pieces[:] = zip(ends, [copy.begun, *events[:-1]], strict=True)
        return paged

    CopyStream._queue = queue


def image_not_held():
    from sglang_elora.swapper.host_tier import HostTier

    HostTier.hold = HostTier.get
    HostTier.release = lambda self, adapter_id: None


def load_of_a_session_not_awaited():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from sglang_elora.srt.mem_cache import radix_cache

    cache = radix_cache.EloraRadixCache
    cache.ready_to_load_host_cache = UnifiedRadixCache.ready_to_load_host_cache


def backup_not_awaited():
    import torch
    from sglang.srt.managers.cache_controller import HiCacheController

    original = HiCacheController.start_writing

    def start_writing(self):
        had = len(self.ack_write_queue)
        original(self)
        for i in range(had, len(self.ack_write_queue)):
            event = torch.cpu.Event()
            self.ack_write_queue[i] = self.ack_write_queue[i]._replace(finish_event=event)

    HiCacheController.start_writing = start_writing


def load():
    globals()[os.environ["MISSING_WAIT"]]()
