"""Determines which batches may still use newly allocated slots."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

MARKS = 4
"""Number of past launches that are remembered. More would only add batches that have already
finished: at most the last few still run."""


class FreeOrder:
    """Orders a copy after the batches that may use its slots, and after no others.

    SGLang's allocator of single slots is a queue: freed slots are appended at the end, and slots
    are taken from the head. So slots taken now were free at an earlier moment if and only if no
    more slots have been taken since than were free then. Each ``mark`` records such a moment with
    an event on the forward stream. Batches launched before the mark run before its event; batches
    launched later do not use slots that were free at the mark and have been free since. This also
    covers the last row of a finished request, which a batch launched before the request was known
    to have finished still writes: its slots are freed after that launch.

    For other allocators (paged ones are stacks, and SGLang may sort the list) the order is unknown,
    so a copy waits for all batches launched so far. Only counts on the host are used; no slot
    number is read.

    Args:
        allocator: Allocator of the KV pool. Its ``alloc`` and ``clear`` are wrapped in place,
            because SGLang builds it before the cache and has no registry for it.
        forward_stream: The stream that batches run on.
    """

    def __init__(self, allocator: Any, forward_stream: Any) -> None:
        self._allocator = allocator
        self._forward_stream = forward_stream
        self._num_taken = 0  # slots taken so far
        # (slots taken so far plus slots free at the mark, event)
        self._marks: deque[tuple[int, Any]] = deque(maxlen=MARKS)
        self._is_queue = type(allocator) is TokenToKVPoolAllocator and not allocator.need_sort
        if self._is_queue:
            self._watch(allocator)

    def mark(self) -> None:
        """Record which slots are free. Call after a batch was launched."""
        if self._is_queue:
            event = torch.get_device_module(self._allocator.device).Event()
            event.record(self._forward_stream)
            self._marks.append((self._num_taken + self._allocator.available_size(), event))

    def wait(self, stream: Any) -> None:
        """Make ``stream`` wait for the batches that may use the slots allocated last."""
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
            self._marks.clear()  # ``clear`` refills the queue in another order
            clear()

        allocator.alloc, allocator.clear = counted_alloc, forgetting_clear
