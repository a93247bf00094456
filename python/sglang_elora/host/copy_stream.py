"""Copies of adapters from host memory into slots of the KV pool, ordered with the batches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sglang_elora.host.link import delay_page_copy, make_copy_stream
from sglang_elora.pages import AdapterImage, KVPlanes, PagedAdapter, PageTable
from sglang_elora.swapper import AdapterCopy

logger = logging.getLogger(__name__)


class CopyStream:
    """The stream that adapter copies run on.

    A copy writes slots only after the work that was queued on the forward stream when the copy
    was started: a batch may still read, or write, what those slots held before.

    Args:
        planes: The KV pool.
        forward_stream: The stream that batches run on.
    """

    def __init__(self, planes: KVPlanes, forward_stream: Any) -> None:
        self._planes = planes
        self._forward_stream = forward_stream
        self._device = torch.get_device_module(planes.device)
        self._is_cuda = planes.device.type == "cuda"
        self._stream = make_copy_stream(self._device)

    def start(
        self, uid: str, image: AdapterImage, slots: torch.Tensor
    ) -> tuple[AdapterCopy, PagedAdapter]:
        """Queue the copy of one adapter; does not wait for it.

        Args:
            slots: int64 ``[num_slots]``, made on the current stream.

        Returns:
            The copy, whose ``error`` is set if it could not be queued, and the adapter as the
            LoRA backend reads it.
        """
        stream, device = self._stream, self._device
        ready = device.Event()
        ready.record(device.current_stream())
        copy = AdapterCopy(uid, len(slots), begun=self._make_event())

        def before_slots() -> None:
            stream.wait_stream(self._forward_stream)

        def after_piece(end_layer: int, num_bytes: int) -> None:
            delay_page_copy(num_bytes)
            event = self._make_event()
            event.record(stream)
            copy.pieces.append((end_layer, event))

        with device.stream(stream):
            ready.wait(stream)
            copy.begun.record(stream)
            if self._is_cuda:
                slots.record_stream(stream)
            table = PageTable(slots)
            if self._is_cuda:
                table.slots.record_stream(self._forward_stream)
            paged = PagedAdapter(image.layout, table, self._planes, image.scaling)
            try:
                self._planes.write(table, image, before_slots=before_slots, after_piece=after_piece)
            except (RuntimeError, ValueError, OSError) as error:
                logger.error("copy of %s failed: %s", uid, error)
                copy.error = error
        return copy, paged

    def _make_event(self) -> Any:
        return self._device.Event(enable_timing=True) if self._is_cuda else self._device.Event()
