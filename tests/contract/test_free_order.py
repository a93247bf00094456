"""Which batches a copy waits for: those that may use its slots, on SGLang's own allocators."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness.swapper_world import SwapperWorld

SLOTS = 64


class Device:
    """Streams and events that say which batches they wait for, by the number of the launch."""

    def __init__(self) -> None:
        self.num_launches = 0
        self.waited_for = -1

    def Event(self) -> Any:
        event = SimpleNamespace(launch=-1)
        event.record = lambda stream: setattr(event, "launch", self.num_launches)
        return event

    def wait_event(self, event: Any) -> None:
        self.waited_for = event.launch

    def wait_stream(self, stream: Any) -> None:
        self.waited_for = self.num_launches


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: made)
    return made


def order_of(num_slots: int, *, page_size: int = 1, need_sort: bool = False) -> Any:
    from sglang_elora.srt.mem_cache.free_order import FreeOrder
    from tests.harness.radix_cache import Cache

    allocator = Cache("elora", num_slots, page_size=page_size).allocator
    allocator.need_sort = need_sort
    return FreeOrder(allocator, forward_stream=None), allocator


def play(order: Any, allocator: Any, device: Device, seed: int, page_size: int = 1) -> list[int]:
    """Allocate, free and launch at random; check each wait against the last user of its slots.

    Returns:
        Per allocation, how many launches lie between the last use of its slots and now, less those
        that are waited for needlessly: 0 where the wait is for everything.
    """
    rng, held, spared = random.Random(seed), [], []
    last_use = [0] * (allocator.size + page_size)  # launch up to which a slot may be in use
    for _ in range(600):
        action = rng.random()
        if action < 0.35:
            slots = allocator.alloc(page_size * rng.randint(1, 6))
            if slots is not None:
                held.append(slots.clone())
                order.wait(device)
                assert device.waited_for >= max(last_use[slot] for slot in slots.tolist())
                spared.append(device.num_launches - device.waited_for)
        elif action < 0.65 and held:
            freed = [held.pop(rng.randrange(len(held))) for _ in range(rng.randint(1, len(held)))]
            is_group = rng.random() < 0.5
            if is_group:
                allocator.free_group_begin()
            for slots in freed:
                allocator.free(slots)
                for slot in slots.tolist():  # by a batch launched before its end was known, too
                    last_use[slot] = device.num_launches
            if is_group:
                allocator.free_group_end()
        elif action < 0.98:
            device.num_launches += 1
            order.mark()
        else:
            allocator.clear()
            held, last_use = [], [device.num_launches] * len(last_use)
    return spared


@pytest.mark.parametrize("seed", range(40))
def test_copy_waits_for_every_batch_that_may_use_its_slots(device: Device, seed: int) -> None:
    order, allocator = order_of(40)
    spared = play(order, allocator, device, seed)
    assert any(spared) and len(spared) > 100, "and not always for all of them"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("page_size", "need_sort"), [(4, False), (4, True), (1, True)])
def test_copy_waits_for_all_batches_if_free_slot_order_is_unknown(
    device: Device, seed: int, page_size: int, need_sort: bool
) -> None:
    order, allocator = order_of(
        160 if page_size > 1 else 40, page_size=page_size, need_sort=need_sort
    )
    spared = play(order, allocator, device, seed, page_size)
    assert len(spared) > 100 and not any(spared)


@pytest.mark.parametrize("num_free_before", [SLOTS - 1, SLOTS])
def test_copy_into_slots_free_before_a_batch_does_not_wait_for_it(
    device: Device, num_free_before: int
) -> None:
    """The other slots are freed after the launch, by a batch's end or by an eviction."""
    from sglang_elora.srt.scheduler.swapper import prepare

    made = SwapperWorld(3 * SLOTS, num_adapters=6, adapter_slots=SLOTS)
    order = made.residency._free_order
    server: Any = SimpleNamespace(tree_cache=SimpleNamespace(elora=made))
    held = made.cache.allocator.alloc(3 * SLOTS - num_free_before)
    for _ in range(2):
        device.num_launches += 1
        prepare(None, server)
    made.cache.allocator.free(held)
    made.cache.allocator.alloc(SLOTS)
    order.wait(device)
    is_enough = num_free_before >= SLOTS
    assert device.waited_for == (1 if is_enough else 2)
