"""Which adapters are on the device: their slots in the KV pool, and how they come and go."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_elora.host.link import delay_page_copy
from sglang_elora.host.tree_core import EloraTreeCore
from sglang_elora.pages import AdapterImage, KVPlanes, PagedAdapter, PageTable

logger = logging.getLogger(__name__)


class PoolTooSmall(ValueError):
    """An adapter cannot be held by the pool, whatever is evicted."""


class Residency:
    """Adapters of one scheduler process, between host images and slots of the KV pool.

    Owned by the LoRA manager, used by admission. An adapter gets its slots when a request that
    names it is admitted (``place``) and its weights right before the forward pass that needs them
    (``fill``): that copy is enqueued on the stream of the forward passes, behind the pass that
    may still read what lay in those slots before.

    Args:
        cache: The ``UnifiedRadixCache`` over an ``EloraTreeCore``.
        weight_dtype: Of the LoRA weights.
    """

    def __init__(self, cache: Any, weight_dtype: torch.dtype) -> None:
        self.cache = cache
        self.core: EloraTreeCore = cache.tree_core
        self.core.on_evicted = self._evicted
        self.forest = self.core.forest
        self.allocator = cache.token_to_kv_pool_allocator
        pool = self.allocator.get_kvcache()
        self.planes = KVPlanes((pool.k_buffer, pool.v_buffer), weight_dtype)
        self._images: dict[str, AdapterImage] = {}
        self._filled: dict[str, PagedAdapter] = {}

    @property
    def pool_slots(self) -> int:
        slots: int = self.allocator.size
        return slots

    def register(self, uid: str, name: str, image: AdapterImage, *, pinned: bool) -> None:
        """Make an adapter servable from its host image.

        Raises:
            PoolTooSmall: It does not fit into the pool beside the pinned adapters, or pinning it
                would leave no room for another. The text has the numbers.
        """
        page_size = self.allocator.page_size
        num_slots = image.layout.num_slots(self.planes.slot_elems, page_size)
        taken = self.forest.pinned_slots
        room = self.pool_slots - taken - page_size
        if num_slots > room:
            raise PoolTooSmall(
                f"LoRA adapter '{name}' takes {num_slots} slots of the KV pool, which has "
                f"{self.pool_slots}, {taken} of them for pinned adapters, and a request needs "
                f"{page_size} more: raise --max-total-tokens or --mem-fraction-static"
            )
        others = max((a.num_slots for a in self.forest if not a.pinned), default=0)
        if pinned and num_slots + others > room:
            raise PoolTooSmall(
                f"LoRA adapter '{name}' cannot be pinned: it takes {num_slots} slots of the KV "
                f"pool, which has {self.pool_slots}, {taken} of them for other pinned adapters, "
                f"and another adapter could not be loaded any more ({others} slots): load it "
                "unpinned, or raise --max-total-tokens or --mem-fraction-static"
            )
        self._images[uid] = image
        self.forest.register(uid, num_slots=num_slots, pinned=pinned, version=image.digest())

    def retire(self, uid: str) -> None:
        """Unload: the adapter's KV on device and host, its slots and its image go.

        What a request or a copy still holds goes with a later ``purge_retired``.
        """
        if uid in self.forest:
            self.forest.retire(uid)
            self._images.pop(uid, None)
            self.purge_retired()

    def purge_retired(self) -> None:
        """Remove what is left of unloaded adapters, as far as nothing holds it."""
        for adapter in self.forest.retired:
            result = self.core.purge(str(adapter.uid))
            self.cache._free_values(result.device_frees, result.host_frees)

    def place(self, uid: str) -> bool:
        """Give an adapter its slots, evicting what is worth less; False if that frees too few."""
        adapter = self.forest.get(uid)
        assert not adapter.retired, f"adapter {uid} was unloaded"
        if adapter.resident:
            return True
        shortfall = adapter.num_slots - self.allocator.available_size()
        if shortfall > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=shortfall))
        slots = self.allocator.alloc(adapter.num_slots)
        if slots is None:
            return False
        self.core.place(uid, slots)
        logger.info("load %s into %d slots", uid, adapter.num_slots)
        return True

    def fill(self, uid: str) -> PagedAdapter:
        """The placed adapter with its weights in its slots. Called on the forward stream."""
        paged = self._filled.get(uid)
        if paged is None:
            adapter = self.forest.get(uid)
            assert adapter.resident, f"adapter {uid} runs without its slots"
            image = self._images[uid]
            slots = self.core.node_of(uid).slots
            if slots.is_cuda:
                # They belong to the scheduler's stream, which may reuse their memory once the
                # adapter is evicted.
                slots.record_stream(torch.cuda.current_stream())
            table = PageTable(slots)
            for piece in image.pieces():
                delay_page_copy(piece.nbytes)
            self.planes.write(table, image)
            paged = self._filled[uid] = PagedAdapter(
                image.layout, table, self.planes, image.scaling
            )
        return paged

    def _evicted(self, uid: str) -> None:
        self._filled.pop(uid, None)
        logger.info("evict %s", uid)

    def statistics(self) -> dict[str, int]:
        """Counts of now and since the start, all in slots or tokens (one slot holds one token)."""
        adapters = list(self.forest)
        return {
            "pool_slots": self.pool_slots,
            "adapter_slots": self.forest.resident_slots,
            "adapters_resident": sum(adapter.resident for adapter in adapters),
            "adapter_loads": sum(adapter.loads for adapter in adapters),
            "adapter_evictions": sum(adapter.evictions for adapter in adapters),
            "kv_tokens_device": sum(a.device_tokens for a in (self.forest.base, *adapters)),
            "kv_tokens_host": sum(a.host_tokens for a in (self.forest.base, *adapters)),
            "kv_tokens_invalid": sum(adapter.invalid_tokens for adapter in adapters),
        }
