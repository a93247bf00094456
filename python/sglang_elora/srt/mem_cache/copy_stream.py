"""Copies of adapters from host memory into slots of the KV pool, ordered with the batches."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch

from sglang_elora.pages import AdapterImage, KVPlanes, PagedAdapter, SlotTable
from sglang_elora.srt.mem_cache.free_order import FreeOrder
from sglang_elora.srt.mem_cache.link import delay_page_copy, make_copy_stream
from sglang_elora.swapper.adapter_copy import AdapterCopy

logger = logging.getLogger(__name__)


class CopyStream:
    """The stream that adapter copies run on.

    A copy writes its slots only after the batches that may still read or write their previous
    content. It also waits for the work queued on the scheduler's stream at its start, which
    computes the numbers of its slots.

    Args:
        planes: The KV pool.
        free_order: Determines which batches may still use newly allocated slots.
        forward_stream: The stream that batches run on.
    """

    def __init__(self, planes: KVPlanes, free_order: FreeOrder, forward_stream: Any) -> None:
        self._planes = planes
        self._free_order = free_order
        self._forward_stream = forward_stream
        self._device = torch.get_device_module(planes.device)
        self._is_cuda = planes.device.type == "cuda"

    @cached_property
    def _stream(self) -> Any:
        """The copy stream, created at the first copy. By then the scheduler has created its own
        streams, and the current stream is the one that it schedules on."""
        avoid = (self._forward_stream, self._device.current_stream())
        return make_copy_stream(self._device, avoid)

    def start(
        self, adapter_id: str, image: AdapterImage, slots: torch.Tensor
    ) -> tuple[AdapterCopy, PagedAdapter | None]:
        """Queue the copy of one adapter, without waiting for it. Never raises.

        Args:
            slots: int64 ``[num_slots]``, from the last allocation, computed on the current stream.

        Returns:
            The copy, and the adapter for the LoRA backend. If the copy could not be queued, its
            ``error`` is set and the adapter is None.
        """
        copy, paged = AdapterCopy(adapter_id, len(slots)), None
        try:
            paged = self._queue(copy, image, slots)
        except Exception as error:  # CUDA, Triton or out of memory: the server keeps running
            logger.exception("the copy of adapter %s could not be queued", adapter_id)
            copy.error = error
        return copy, paged

    def synchronize(self) -> None:
        """Block until all queued copies have run; on a CPU they already have."""
        if self._is_cuda:
            self._stream.synchronize()

    def clear(self, slots: torch.Tensor) -> None:
        """Zero the slots of an evicted adapter, whose copy has finished.

        Queued on the current stream after all batches launched so far, which may read the adapter.
        The next writer of these slots (a batch, a copy, a load of KV) waits for the current stream.

        Args:
            slots: int64 ``[num_slots]``, computed on the current stream.
        """
        self._device.current_stream().wait_stream(self._forward_stream)
        for layer in range(self._planes.num_layers):
            for plane in range(self._planes.num_planes):
                self._planes.plane(plane, layer).index_fill_(0, slots, 0)

    def _queue(self, copy: AdapterCopy, image: AdapterImage, slots: torch.Tensor) -> PagedAdapter:
        stream, device = self._stream, self._device
        ready = device.Event()
        ready.record(device.current_stream())

        def before_slots() -> None:
            arrived = self._record()
            self._free_order.wait(stream)
            copy.wait_for_slots = (arrived, self._record())

        def after_piece(end_layer: int, num_bytes: int) -> None:
            delay_page_copy(num_bytes)
            copy.pieces.append((end_layer, self._record()))

        with device.stream(stream):
            ready.wait(stream)
            copy.begun = self._record()
            if self._is_cuda:
                slots.record_stream(stream)
            table = SlotTable(slots)
            if self._is_cuda:
                table.slots.record_stream(self._forward_stream)
            self._planes.write(table, image, before_slots=before_slots, after_piece=after_piece)
        return PagedAdapter(image.layout, table, self._planes, image.scaling)

    def _record(self) -> Any:
        """A timed event after the work queued on the copy stream so far."""
        event = self._device.Event(enable_timing=True) if self._is_cuda else self._device.Event()
        event.record(self._stream)
        return event
