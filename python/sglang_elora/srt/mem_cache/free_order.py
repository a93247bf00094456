"""Which batches may still use the slots that an allocation hands out."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

MARKS = 4
"""Batches whose launch is remembered. A copy whose slots were free before the oldest of them
waits for no batch that still runs; more marks would only name batches that are long over."""


class FreeOrder:
    """Orders a copy after the batches that may use its slots, and after no others.

    SGLang's allocator of single slots is a queue: freed slots are appended to it, and slots are
    taken from its head. So slots that are taken now were free at an earlier moment if and only if
    no more slots have been taken since than were free then. Each ``mark`` is such a moment, with
    an event on the forward stream. Batches launched before the mark run before its event; those
    launched later do not use slots that were free at the mark and have been free since. That
    includes a finished request's last row, which a batch that was launched before its end was
    known still writes: its slots are freed after that launch.

    Of other allocators (pages are a stack, and SGLang may sort) the order is not known: a copy
    waits for all batches launched so far. Kept on the host: no slot number is read.

    Args:
        allocator: Of the KV pool. Its ``alloc`` and ``clear`` are wrapped in place, because
            SGLang has built it before it asks for a cache, from no registry.
        forward_stream: The stream that batches run on.
    """

    def __init__(self, allocator: Any, forward_stream: Any) -> None:
        self._allocator = allocator
        self._forward_stream = forward_stream
        self._num_taken = 0  # slots, ever
        # (slots ever taken, and those free, at the mark; event)
        self._marks: deque[tuple[int, Any]] = deque(maxlen=MARKS)
        self._is_queue = type(allocator) is TokenToKVPoolAllocator and not allocator.need_sort
        if self._is_queue:
            self._watch(allocator)

    def mark(self) -> None:
        """Note what is free. Called after a batch was launched."""
        if self._is_queue:
            event = torch.get_device_module(self._allocator.device).Event()
            event.record(self._forward_stream)
            self._marks.append((self._num_taken + self._allocator.available_size(), event))

    def wait(self, stream: Any) -> None:
        """Have ``stream`` wait for the batches that may use the slots allocated last."""
        for num_appended, event in self._marks:
            if self._num_taken <= num_appended:
                stream.wait_event(event)
                return
        stream.wait_stream(self._forward_stream)

    def _watch(self, allocator: Any) -> None:
        alloc, clear = allocator.alloc, allocator.clear

        def counted_alloc(need_size: int) -> torch.Tensor | None:
            slots: torch.Tensor | None = alloc(need_size)
            if slots is not None:
                self._num_taken += len(slots)
            return slots

        def forgetting_clear() -> None:
            self._marks.clear()  # it fills the queue in another order
            clear()

        allocator.alloc, allocator.clear = counted_alloc, forgetting_clear
