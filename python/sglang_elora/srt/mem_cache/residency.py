"""Loading and eviction of adapters: their slots in the KV pool, their copies, pins and unloads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import BaseEvictionResult

from sglang_elora.control import Histogram, Tier
from sglang_elora.pages import EMBEDDING, AdapterImage, AdapterLayout, PagedAdapter
from sglang_elora.srt.mem_cache import branches
from sglang_elora.srt.mem_cache.copy_stream import CopyStream
from sglang_elora.srt.mem_cache.free_order import FreeOrder
from sglang_elora.srt.mem_cache.freed import parts_of
from sglang_elora.srt.mem_cache.kv_pool import planes_of, slot_allocator
from sglang_elora.srt.mem_cache.longest_runs import take_longest_runs
from sglang_elora.srt.mem_cache.ranks import Ranks
from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore
from sglang_elora.swapper.adapter_copy import AdapterCopy, Copied
from sglang_elora.swapper.host_tier import HostTier
from sglang_elora.swapper.reading import ReadImage
from sglang_elora.tree import Adapter, Eviction

logger = logging.getLogger(__name__)


ROOM_BESIDE_PINS = 256
"""Tokens for which pins must leave room, in addition to the largest unpinned adapter; in a small
pool at most an eighth of it. Raising it refuses more pins."""

ReplaysGraph = Callable[[int, int], bool]
"""Maps (requests, tokens to compute) to whether a prefill graph replays such a batch."""

PURGE_NODES = 6
"""Most nodes of unloaded adapters that a step checks; removing one takes about 10 us. More free
slots sooner, but lengthen the steps."""


_UNLOAD, _ORDERED = Eviction(reason="unload"), Eviction(reason="api")


class PoolTooSmall(ValueError):
    """An adapter does not fit into the pool, regardless of what is evicted."""


class AdapterChanged(ValueError):
    """The content of an adapter's file differs from that of its first read."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Description of an adapter before its weights are read.

    ``read`` reads the weights from its file; an adapter without a file has an ``image`` instead.
    """

    adapter_id: str
    name: str
    layout: AdapterLayout
    num_bytes: int  # size of its image on this rank
    pinned: bool
    num_dropped: int = 0  # stored weights that are not served
    invocation: tuple[int, ...] = ()  # tokens of an activated LoRA
    read: ReadImage | None = None
    image: AdapterImage | None = None


class Residency:
    """The adapters of one scheduler process, in host memory and in slots of the KV pool.

    ``start_copy`` allocates an adapter's slots and starts the copy of its weights on another
    stream. The adapter cannot be evicted until all ranks have the copy (``settle``). A batch may
    use it before that: it waits for each layer's weights when it reaches the layer (``paged`` and
    ``copies``).

    Args:
        cache: The ``UnifiedRadixCache`` over an ``EloraTreeCore``.
        weight_dtype: Dtype of the LoRA weights.
        host: The host tier with the adapters' images.
        forward_stream: The stream that batches run on, which may still read freed slots.
        is_async: Work on streams is asynchronous. If not, adapters get consecutive slots.
    """

    def __init__(
        self,
        cache: Any,
        weight_dtype: torch.dtype,
        host: HostTier,
        forward_stream: Any,
        *,
        is_async: bool = True,
    ) -> None:
        self.cache = cache
        self.core: EloraTreeCore = cache.tree_core
        self.core.on_evicted = self._evicted
        self.adapter_table = self.core.adapter_table
        self.host = host
        self.ranks = Ranks(cache)
        self.allocator = slot_allocator(cache.token_to_kv_pool_allocator)
        self._takes_runs = not is_async and type(self.allocator) is TokenToKVPoolAllocator
        pool = cache.token_to_kv_pool_allocator.get_kvcache()
        self.planes = planes_of(pool, weight_dtype)
        # Attention kernels may load the unused end of a request's last page. Old adapter weights
        # there are finite in the dtype of weights, but may be NaN in the dtype of the KV.
        self._clears_slots = self.allocator.page_size > 1 and pool.dtype != weight_dtype
        self._to_clear: dict[str, torch.Tensor] = {}  # adapter -> slots to zero at its eviction
        self.copies: dict[str, AdapterCopy] = {}  # in progress, in the order of their starts
        self._paged: dict[str, PagedAdapter] = {}
        self._free_order = FreeOrder(self.allocator, forward_stream)
        self._copy_stream = CopyStream(self.planes, self._free_order, forward_stream)
        self.names: dict[str, str] = {}  # id -> name of the loaded adapters
        self.load_s = Histogram()
        self.num_launches = 0  # batches launched so far
        self.replays_prefill_graph: ReplaysGraph = lambda num_requests, num_tokens: False
        self.is_purging = False  # the last ``purge_retired`` may have left removable nodes

    @property
    def pool_slots(self) -> int:
        slots: int = self.allocator.size
        return slots

    def name_of(self, adapter_id: str) -> str:
        """The adapter's served name, for messages."""
        return self.names.get(adapter_id, adapter_id)

    def tier_of(self, adapter_id: str) -> Tier:
        """The tier that holds the adapter's weights."""
        if self.adapter_table.get(adapter_id).resident:
            return "loading" if adapter_id in self.copies else "device"
        if adapter_id in self.host:
            return "host"
        return "reading" if self.host.is_reading(adapter_id) else "disk"

    def register(self, source: AdapterSource) -> None:
        """Register an adapter, so that requests can use it.

        Raises:
            PoolTooSmall: It does not fit into the pool in addition to the pinned adapters, or
                pinning it would leave no room for another adapter. The text has the numbers.
            ValueError: It is an activated LoRA, and the model has layers without KV.
            HostTierFull: It has no file, and the host tier has no room for its image.
        """
        page_size, name = self.allocator.page_size, source.name
        if source.invocation and len(self.core.components) > 1:
            raise ValueError(
                f"LoRA adapter '{name}' is an activated LoRA, which is not served with a model "
                "some of whose layers have a state or a sliding window in place of KV"
            )
        num_slots = source.layout.num_slots(self.planes.slot_elems, page_size)
        taken = self.adapter_table.pinned_slots
        if num_slots > self.pool_slots - taken - page_size:
            raise PoolTooSmall(
                f"LoRA adapter '{name}' takes {num_slots} slots of the KV pool, which has "
                f"{self.pool_slots}, {taken} of them for pinned adapters, and a request needs "
                f"{page_size} more: raise --max-total-tokens or --mem-fraction-static"
            )
        if source.pinned:
            self._check_pin(name, num_slots, self.adapter_table.largest_unpinned())
        self.host.add(source.adapter_id, source.num_bytes, source.read, source.image)
        version = "" if source.image is None else source.image.version
        adapter = self.adapter_table.register(
            source.adapter_id, num_slots=num_slots, pinned=source.pinned, version=version
        )
        adapter.num_dropped, adapter.invocation = source.num_dropped, source.invocation
        if source.invocation:
            self.core.full.lock_adapters()
        self.names[source.adapter_id] = name

    def pin(self, adapter_id: str) -> None:
        """Pin an adapter: once it is on the device, it is not evicted.

        Raises:
            PoolTooSmall: The pool would have no room for another adapter.
        """
        adapter = self.adapter_table.get(adapter_id)
        if not adapter.pinned:
            others = self.adapter_table.largest_unpinned(without=adapter_id)
            self._check_pin(self.name_of(adapter_id), adapter.num_slots, others)
            self.adapter_table.pin(adapter)
            if adapter.resident:
                self.core.inc_full_pin(self.core.node_of(adapter_id).id)

    def unpin(self, adapter_id: str) -> None:
        """Unpin an adapter, so that it may be evicted."""
        adapter = self.adapter_table.get(adapter_id)
        if adapter.pinned:
            self.adapter_table.unpin(adapter)
            if adapter.resident:
                self.core.dec_full_pin(self.core.node_of(adapter_id).id)

    def _check_pin(self, name: str, num_slots: int, others: int) -> None:
        taken, page_size = self.adapter_table.pinned_slots, self.allocator.page_size
        tokens = max(page_size, min(ROOM_BESIDE_PINS, self.pool_slots // 8))
        if num_slots + others > self.pool_slots - taken - tokens:
            raise PoolTooSmall(
                f"LoRA adapter '{name}' cannot be pinned: it takes {num_slots} slots of the KV "
                f"pool, which has {self.pool_slots}, {taken} of them for other pinned adapters, "
                f"and another adapter ({others} slots) with a request of {tokens} tokens would "
                "not fit any more: load it unpinned, or raise --max-total-tokens or "
                "--mem-fraction-static"
            )

    def check_content(self, adapter_id: str, image: AdapterImage, *, is_same: bool) -> None:
        """Set an adapter's version from its first image; check that later images are equal to it.

        Args:
            is_same: Whether all ranks have read the same content.

        Raises:
            AdapterChanged: The file's content has changed, or differed between two ranks' reads.
        """
        if not is_same:
            raise AdapterChanged(
                "its file was replaced while it was being read: unload it and load it again"
            )
        adapter = self.adapter_table.get(adapter_id)
        if adapter.version and image.version != adapter.version:
            raise AdapterChanged(
                "its file has changed since it was loaded, and what is cached was computed with "
                "the old weights: unload it and load it again"
            )
        adapter.version = image.version

    def retire(self, adapter_id: str) -> None:
        """Unload an adapter: remove its image, its slots and its KV on device and host.

        A bounded part is removed at once, the rest by later calls of ``purge_retired``.
        """
        if adapter_id in self.adapter_table:
            self.adapter_table.retire(adapter_id)
            self.host.remove(adapter_id)
            self.names.pop(adapter_id, None)
            self.purge_retired(PURGE_NODES)

    def purge_retired(self, most_nodes: int) -> bool:
        """Remove some remaining nodes of unloaded adapters that no request or copy holds.

        Args:
            most_nodes: Most nodes to check, round robin over the adapters.

        Returns:
            Whether something was removed (``is_purging`` until the next call).
        """
        num_looks = num_removed = 0
        for _ in range(self.adapter_table.num_retired):
            adapter = self.adapter_table.next_retired()
            if adapter is None or num_looks >= most_nodes:
                break
            with self.core.evicting(_UNLOAD):
                done = branches.purge(self.core, str(adapter.adapter_id), most_nodes - num_looks)
            self.cache._apply_eviction_result(done.freed)
            num_looks += done.num_looks
            num_removed += done.num_removed
        self.is_purging = num_removed > 0 and self.adapter_table.num_retired > 0
        return num_removed > 0

    def start_copy(self, adapter_id: str) -> bool:
        """Allocate slots for an adapter whose image is in host memory, and start its copy.

        Returns:
            Whether there were enough free slots.
        """
        adapter = self.adapter_table.get(adapter_id)
        assert not adapter.retired and not adapter.resident, (
            f"adapter {adapter_id} cannot be loaded"
        )
        if self._takes_runs:
            slots = take_longest_runs(self.allocator, adapter.num_slots)
        else:
            slots = self.allocator.alloc(adapter.num_slots)
        if slots is None:
            return False
        copy = self.copies[adapter_id] = self._start_copy(adapter_id, slots)
        copy.launches_before = self.num_launches
        self.core.counts.adapter_slots_from_host += adapter.num_slots
        logger.info("load %s into %d slots", self.name_of(adapter_id), adapter.num_slots)
        return True

    def _start_copy(self, adapter_id: str, slots: torch.Tensor) -> AdapterCopy:
        """Place the slots, take the pin and hold the image of an adapter, then queue its copy;
        ``settle`` releases them.

        Never raises, so that each resource taken has a copy that accounts for it; the ``error`` of
        a copy that could not be queued is set.
        """
        failure: Exception | None = None
        try:
            slots = slots.clone()  # a view would keep the allocator's whole free list alive
        except (RuntimeError, MemoryError) as error:
            failure = error
        self.core.inc_full_pin(self.core.node_of(adapter_id).id)
        self.core.place(adapter_id, slots)
        image = self.host.hold(adapter_id)
        if failure is not None:
            return AdapterCopy(adapter_id, len(slots), error=failure)
        if self._clears_slots:
            self._to_clear[adapter_id] = slots
        copy, paged = self._copy_stream.start(adapter_id, image, slots)
        if paged is not None:
            self._paged[adapter_id] = paged
        return copy

    def evict_branch(self, adapter_id: str, most_leaves: int) -> bool:
        """Evict leaves of one adapter that no request holds, KV before the adapter itself.

        KV without a host copy is dropped, not copied to the host as in other evictions.

        Returns:
            Whether nothing is left that can be evicted.
        """
        freed = BaseEvictionResult()
        with self.core.evicting(_ORDERED):
            is_over = branches.evict(self.core, adapter_id, most_leaves, parts_of(freed))
        self.cache._apply_eviction_result(freed)
        return is_over

    def settle(self, adapter_id: str, code: Copied) -> Exception | None:
        """Complete a copy that has finished on all ranks or failed on one. Returns the error."""
        copy = self.copies.pop(adapter_id)
        node = self.core.node_of(adapter_id)
        self.core.dec_full_pin(node.id)
        if code != Copied.DONE:
            self._copy_stream.synchronize()  # so that no copy uses the image or slots any more
            copy.synchronize()
        self.host.release(adapter_id)
        self.adapter_table.touch(adapter_id)
        if code == Copied.DONE:
            self.load_s.observe(time.monotonic() - copy.started_s)
            return None
        result = self.core.displace(adapter_id)
        self.cache._apply_eviction_result(result)
        return copy.error or RuntimeError("another rank could not copy it")

    def launched(self) -> None:
        """Record that a batch was launched."""
        self.num_launches += 1
        self._free_order.mark()

    def is_usable(self, adapter: Adapter) -> bool:
        """Whether batches and KV of the adapter may rely on its slots: every rank has queued its
        copy, which cannot fail any more."""
        copy = self.copies.get(str(adapter.adapter_id))
        return adapter.resident and (copy is None or copy.confirmed)

    def paged(self, adapter_id: str) -> PagedAdapter:
        """The resident adapter for the LoRA backend. Its copy may still be in ``copies``."""
        return self._paged[adapter_id]

    def adapts_embedding(self, adapter_id: str) -> bool:
        """Whether a resident adapter has weights for the embedding, so that a batch waits for its
        whole copy."""
        return self._paged[adapter_id].has(EMBEDDING)

    def _evicted(self, adapter_id: str) -> None:
        copy = self.copies.pop(adapter_id, None)
        if copy is not None:  # the whole cache was flushed
            self._copy_stream.synchronize()
            copy.synchronize()
            self.host.release(adapter_id)
        self._paged.pop(adapter_id, None)
        if (slots := self._to_clear.pop(adapter_id, None)) is not None:
            self._copy_stream.clear(slots)
        logger.info("evict %s", self.name_of(adapter_id))

    def statistics(self) -> dict[str, int]:
        """Current and cumulative counts, in slots or tokens (one slot holds one token)."""
        return {
            **self.core.counts.flat(),
            "pool_slots": self.pool_slots,
            "adapter_slots": self.adapter_table.resident_slots,
            "adapters_resident": self.adapter_table.num_resident,
            "adapters_on_host": len(self.host),
            "adapter_host_bytes": self.host.num_bytes,
            "adapter_files_read": self.host.num_reads,
            "kv_tokens_device": self.adapter_table.device_tokens,
            "kv_tokens_host": self.adapter_table.host_tokens,
            "kv_tokens_invalid": self.adapter_table.invalid_tokens,
        }
