"""The swapper's decisions, step by step, on the server's own pool and tree without a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from sglang_elora.pages import AdapterImage
from sglang_elora.swapper.pending_hints import CREDIT_STEPS, HINT_STEPS, HINTED_SHARE, MOST_CREDIT
from tests.harness.swapper_world import (
    EVICT_LEAVES,
    LOOKAHEAD,
    ROOM_LEAVES,
    WORK_PER_STEP,
    AdapterSource,
    PoolTooSmall,
    SwapperWorld,
    adapter_id,
)

SLOTS = 64  # of an adapter


def world(
    num_slots: int = 6 * SLOTS, *, num_adapters: int = 12, policy: str = "lru"
) -> SwapperWorld:
    return SwapperWorld(num_slots, num_adapters=num_adapters, adapter_slots=SLOTS, policy=policy)


def resident(made: SwapperWorld) -> list[int]:
    return [i for i, adapter in enumerate(made.residency.adapter_table) if adapter.resident]


def bring(made: SwapperWorld, *adapters: int) -> None:
    """Have them on the device, and nobody waiting."""
    for i in adapters:
        made.arrive(adapter_id(i))
        made.step()
        made.waiting.clear()
        made.step()
        assert made.is_resident(adapter_id(i))


def fill(made: SwapperWorld, i: int) -> None:
    """The rest of the pool with KV of an adapter that is there, a leaf per slot."""
    for token in range(made.cache.allocator.available_size()):
        made.cache_kv(adapter_id(i), [1000 * i + token])


def test_what_waits_is_brought_in_its_order_before_its_turn() -> None:
    made = world(4 * SLOTS)
    for i in (3, 1, 2):
        made.arrive(adapter_id(i))
    for there in ([3], [1, 3], [1, 2, 3]):  # a quarter of the pool may be under way at once
        made.step()
        assert resident(made) == there
    made.check()


def test_a_request_behind_the_lookahead_waits_for_its_turn() -> None:
    made = world(200 * SLOTS, num_adapters=LOOKAHEAD + 2)
    for i in range(LOOKAHEAD + 2):
        made.arrive(adapter_id(i))
    for _ in range(LOOKAHEAD):
        made.step()
    assert resident(made) == list(range(LOOKAHEAD))


def test_nothing_is_given_up_for_a_request_that_an_earlier_one_needs() -> None:
    """Three fit, and the pool is full with those that the first three wait for."""
    made = world(3 * SLOTS + 10)
    bring(made, 0, 1, 2)
    for i in (2, 1, 0, 5):
        made.arrive(adapter_id(i))
    for _ in range(5):
        made.step()
    assert resident(made) == [0, 1, 2]
    del made.waiting[0]  # 2 has run and is needed no more
    for _ in range(3):
        made.step()
    assert resident(made) == [0, 1, 5]
    made.check()


def test_evictions_are_few_per_step_and_one_behind_does_not_take_what_they_free() -> None:
    """The room of an adapter is that of 32 leaves; while batches run, a step gives up 3."""
    leaf = 2
    made = world(4 * SLOTS)
    bring(made, 7)
    for i in range((made.cache.allocator.available_size()) // leaf):
        made.cache_kv(adapter_id(7), [i, 0])
    assert made.cache.allocator.available_size() < leaf
    made.arrive(adapter_id(0))
    made.arrive(adapter_id(1))
    for steps in range(1, SLOTS // leaf // WORK_PER_STEP + 1):
        made.step()
        assert made.cache.allocator.available_size() == steps * WORK_PER_STEP * leaf
    made.step()  # the last leaves
    made.step()
    assert resident(made) == [0, 7]
    made.check()


def test_a_copy_is_put_off_once_and_not_again() -> None:
    """Its room is there, and others take of it before each step: it would never be its turn."""
    made = world(4 * SLOTS)
    bring(made, 7)
    for i in range(made.cache.allocator.available_size()):
        made.cache_kv(adapter_id(7), [i])
    made.arrive(adapter_id(0))
    for i in range(3 * SLOTS):
        if made.is_resident(adapter_id(0)):
            break
        made.step()
        for taken in range(2):  # so that every step has leaves to give up
            if made.cache.allocator.available_size():
                made.cache_kv(adapter_id(7), [1000 + 2 * i + taken])
    assert made.is_resident(adapter_id(0))
    made.check()


@pytest.mark.parametrize(("rest", "is_placed"), [(2 * SLOTS, True), (3 * SLOTS, False)])
def test_an_adapter_does_not_take_the_room_of_a_prompt_s_next_chunks(
    rest: int, is_placed: bool
) -> None:
    """SGLang takes that room without asking, and ends if it is not there."""
    made = world(4 * SLOTS)
    bring(made, 7)
    made.scheduler.chunked_req = SimpleNamespace(
        full_untruncated_fill_ids=range(1000), prefix_len=1000 - rest
    )
    made.arrive(adapter_id(0))
    made.step()
    assert made.is_resident(adapter_id(0)) == is_placed
    made.scheduler.chunked_req = None
    made.step()
    assert made.is_resident(adapter_id(0))
    made.check()


def test_room_for_the_next_load_is_made_behind_a_batch() -> None:
    """From KV, a few leaves at a time, and no more than a load will take; not from adapters."""
    made = world(8 * SLOTS, num_adapters=30)
    bring(made, *range(20))  # so that loads of this size are usual
    made.cache.evict(5 * SLOTS)
    there = resident(made)
    fill(made, there[-1])
    for i in there:
        made.core.visit(made.core.node_of(adapter_id(i)).id)
    before = made.residency.statistics()["kv_slots_evicted"]
    made.step()
    assert made.cache.allocator.available_size() == 0  # nothing before a batch
    free = 0
    for _ in range(2 * SLOTS // ROOM_LEAVES):
        made.swapper.prepare()
        now = made.cache.allocator.available_size()
        assert now - free <= ROOM_LEAVES
        free = now
    assert SLOTS <= free <= 1.3 * SLOTS
    counts = made.residency.statistics()
    assert counts["kv_slots_evicted.proactive"] == counts["kv_slots_evicted"] - before == free
    assert resident(made) == there
    made.arrive(adapter_id(25))
    made.step()
    assert made.is_resident(adapter_id(25))  # at once
    made.check()


def test_no_room_is_made_while_no_adapter_comes() -> None:
    made = world(4 * SLOTS)
    bring(made, 1, 2, 3, 4, 5, 6)
    for _ in range(2):  # turnovers
        made.cache.evict(4 * SLOTS)
        bring(made, 7)
        fill(made, 7)
        made.core.policy.advance(1.1)
    for _ in range(20):
        made.swapper.prepare()
    assert made.cache.allocator.available_size() == 0


def test_adapters_do_not_make_room_beforehand() -> None:
    made = world(4 * SLOTS)
    bring(made, *range(12))
    for _ in range(20):
        made.swapper.prepare()
    assert resident(made) == [8, 9, 10, 11]


def test_with_no_batch_to_delay_all_is_done_at_once() -> None:
    made = world(4 * SLOTS)
    bring(made, 7)
    for i in range(made.cache.allocator.available_size() // 2):
        made.cache_kv(adapter_id(7), [i, 0])
    made.arrive(adapter_id(0))
    made.step(is_busy=False)
    assert resident(made) == [0, 7]


def test_what_nobody_waits_for_any_more_may_go_again() -> None:
    made = world(3 * SLOTS + 10)
    bring(made, 0, 1, 2)
    made.arrive(adapter_id(0))
    made.step()
    assert made.core.is_held(adapter_id(0))
    made.waiting.clear()
    made.step()
    assert not made.core.is_held(adapter_id(0))
    bring(made, 3, 4, 5)
    assert resident(made) == [3, 4, 5]


def test_prefetch_brings_back_the_dearest_without_giving_up_anything() -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10, 11)  # in the place of 0 and 1
    evicted = made.residency.statistics()["adapter_evictions.capacity"]
    assert resident(made) == list(range(2, 12))
    for i in range(4, 10):
        made.residency.retire(adapter_id(i))  # 4 of 10 are in use now
    for _ in range(10):
        made.step()
    assert made.is_resident(adapter_id(0)) and made.is_resident(adapter_id(1))
    counts = made.residency.statistics()
    assert counts["adapter_evictions.capacity"] == evicted
    assert counts["prefetched_slots"] == 2 * SLOTS
    made.core.visit(made.core.node_of(adapter_id(0)).id)
    assert made.residency.statistics()["prefetched_slots_used"] == SLOTS
    bring(made, 2, 3)
    made.check()


@pytest.mark.parametrize("in_use", [7, 8])
def test_no_prefetch_at_seventy_percent(in_use: int) -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10)
    for i in range(1, 11 - in_use):
        made.residency.retire(adapter_id(i))
    for _ in range(4):
        made.step()
    assert not made.is_resident(adapter_id(0))
    assert made.residency.statistics()["prefetched_slots"] == 0


def test_prefetch_that_was_of_no_use_is_counted() -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10)
    for i in range(1, 8):
        made.residency.retire(adapter_id(i))
    for _ in range(4):
        made.step()
    assert made.is_resident(adapter_id(0))
    made.cache.evict(9 * SLOTS)
    assert made.residency.statistics()["prefetched_slots_wasted"] == SLOTS
    made.check()


def test_no_prefetch_while_somebody_waits() -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10)
    for i in range(1, 8):
        made.residency.retire(adapter_id(i))
    made.arrive(adapter_id(10))
    for _ in range(4):
        made.step()
    assert not made.is_resident(adapter_id(0))


def test_a_hint_brings_an_adapter_behind_what_waits() -> None:
    made = world(4 * SLOTS)
    made.swapper.expect([adapter_id(5)])
    made.arrive(adapter_id(1))
    made.step()
    assert resident(made) == [1]
    made.waiting.clear()
    made.step()
    assert resident(made) == [1, 5]
    made.check()


def test_a_hint_makes_room_but_not_from_what_a_request_needs() -> None:
    made = world(3 * SLOTS + 10)
    bring(made, 0, 1, 2)
    for i in (0, 1):
        made.arrive(adapter_id(i))
    made.swapper.expect([adapter_id(7)])
    made.step()
    assert resident(made) == [0, 1, 7]
    made.arrive(adapter_id(2))
    made.swapper.expect([adapter_id(8)])
    for _ in range(3):
        made.step()
    assert resident(made) == [0, 1, 2], "a request goes before a hint"
    made.check()


def test_a_hint_holds_until_its_request_runs_or_for_some_batches() -> None:
    made = world(2 * SLOTS + 10)
    made.swapper.expect([adapter_id(0)])
    for _ in range(3):
        made.step()
    assert made.core.is_held(adapter_id(0))
    made.swapper.used(adapter_id(0))
    made.step()
    assert not made.core.is_held(adapter_id(0))
    made.swapper.expect([adapter_id(1)])
    for _ in range(HINT_STEPS):
        made.step()
    assert made.core.is_held(adapter_id(1))
    for _ in range(3):
        made.step()
    assert not made.core.is_held(adapter_id(1)) and made.is_resident(adapter_id(1))
    statistics = made.residency.statistics()
    assert (statistics["hints"], statistics["hints_used"]) == (2, 1)
    made.check()


def test_hints_are_followed_as_long_as_they_come_true() -> None:
    true, false = range(2 * MOST_CREDIT), range(2 * MOST_CREDIT, 3 * MOST_CREDIT)
    others = (3 * MOST_CREDIT, 3 * MOST_CREDIT + 1)
    made = world(200 * SLOTS, num_adapters=len(true) + len(false) + len(others))

    def hint(i: int, *, ordered: bool = False) -> bool:
        made.swapper.expect([adapter_id(i)], ordered=ordered)
        for _ in range(2):
            made.step(is_busy=False)  # what was copied is settled in the next one
        return made.is_resident(adapter_id(i))

    for i in true:
        assert hint(i)
        made.swapper.used(adapter_id(i))
    assert all(map(hint, false))
    assert not hint(others[0])
    assert hint(others[1], ordered=True)
    made.arrive(adapter_id(others[0]))
    made.step()
    assert made.is_resident(adapter_id(others[0])), "a request is served"
    made.check()


def test_credit_for_hints_returns_with_time() -> None:
    made = world(200 * SLOTS, num_adapters=MOST_CREDIT + 2)
    for i in range(MOST_CREDIT + 1):
        made.swapper.expect([adapter_id(i)])
        made.step()
    assert not made.is_resident(adapter_id(MOST_CREDIT))
    for _ in range(CREDIT_STEPS):
        made.swapper.expect([adapter_id(MOST_CREDIT)])
        made.step()
    assert made.is_resident(adapter_id(MOST_CREDIT))
    made.check()


@pytest.mark.parametrize("ordered", [False, True])
def test_what_cannot_be_read_is_not_tried_again_for_a_hint(ordered: bool) -> None:
    def read(chunks: Sequence[torch.Tensor]) -> AdapterImage:
        raise OSError("gone")

    made = world()
    image = made.host.get(adapter_id(0))
    made.residency.register(
        AdapterSource("bad", "bad", image.layout, image.nbytes, False, read=read)
    )
    made.swapper.expect(["bad"], ordered=ordered)
    deadline = time.monotonic() + 10
    while not made.residency.statistics()["adapter_reads_failed"]:
        assert time.monotonic() < deadline
        made.step(is_busy=False)
    for _ in range(50):
        made.step(is_busy=False)
        time.sleep(0.001)
    assert made.residency.statistics()["adapter_reads_failed"] == 1
    assert not made.swapper.is_waiting
    made.check()


def test_what_came_for_hints_alone_holds_a_small_part_of_the_pool() -> None:
    made = world(int(3 * SLOTS / HINTED_SHARE) + 10, num_adapters=40)
    for _ in range(2):
        for i in range(6):
            made.swapper.expect([adapter_id(i)])
        for _ in range(3):
            made.step()
    assert len(resident(made)) == 3
    assert [i for i in range(40) if made.core.is_held(adapter_id(i))] == resident(made)
    bring(made, 30)
    made.swapper.expect([adapter_id(30)])
    made.step()
    assert not made.core.is_held(adapter_id(30)), "nothing is to be done for what is there"
    made.check()


def test_what_nobody_waits_for_comes_one_after_the_other_in_the_order_it_was_named() -> None:
    made = world(8 * SLOTS)
    made.swapper.expect([adapter_id(3), adapter_id(1), adapter_id(2)], ordered=True)
    for there in ([3], [1, 3], [1, 2, 3]):
        made.swapper.step(made.scheduler, is_busy=False)
        assert resident(made) == there
    made.swapper.expect([adapter_id(4), adapter_id(5)])
    made.arrive(adapter_id(6))
    made.arrive(adapter_id(7))
    made.step(is_busy=False)
    assert resident(made) == [1, 2, 3, 6, 7], "both that are waited for, and nothing behind them"
    made.check()


def test_hints_that_mean_nothing_are_dropped() -> None:
    made = world(8 * SLOTS)
    made.swapper.expect(["nobody", adapter_id(0)])
    made.swapper.expect(f"x{i}" for i in range(1000))
    made.residency.retire(adapter_id(3))
    made.swapper.expect([adapter_id(3)])
    made.step()
    assert resident(made) == [0]
    assert made.residency.statistics()["hints_dropped"] == 1002
    made.check()


def test_an_adapter_that_is_told_to_leave_goes_with_its_kv_a_part_at_a_time() -> None:
    made = world(8 * SLOTS)
    bring(made, 0, 1)
    for i in range(2 * EVICT_LEAVES):
        made.cache_kv(adapter_id(0), [i])
    made.cache_kv(adapter_id(1), [0])
    made.swapper.evict_soon(adapter_id(0))
    made.swapper.prepare()
    assert made.residency.adapter_table.get(adapter_id(0)).device_tokens == EVICT_LEAVES
    made.swapper.prepare()
    made.swapper.prepare()
    assert resident(made) == [1] and made.residency.adapter_table.device_tokens == 1
    made.check()


def test_what_is_used_waited_for_or_pinned_is_not_told_to_leave() -> None:
    made = world(8 * SLOTS)
    bring(made, 0, 1, 2)
    receipt = made.cache.lock(made.core.node_of(adapter_id(0)).id)
    made.arrive(adapter_id(1))
    made.step()
    made.residency.pin(adapter_id(2))
    for i in range(3):
        with pytest.raises(ValueError, match="uses the adapter"):
            made.swapper.evict_soon(adapter_id(i))
    made.cache.unlock(made.core.node_of(adapter_id(0)).id, receipt)
    made.swapper.evict_soon(adapter_id(0))
    made.arrive(adapter_id(0))  # comes after all
    made.step()
    made.swapper.prepare()
    assert resident(made) == [0, 1, 2]
    made.check()


def test_a_pinned_adapter_stays_and_an_unpinned_one_goes() -> None:
    made = world(3 * SLOTS + 10)
    bring(made, 0)
    made.residency.pin(adapter_id(0))
    made.residency.pin(adapter_id(0))
    bring(made, 1, 2, 3)
    assert made.is_resident(adapter_id(0))
    made.residency.unpin(adapter_id(0))
    made.residency.unpin(adapter_id(0))
    bring(made, 4, 5, 7, 8)
    assert not made.is_resident(adapter_id(0))
    made.residency.pin(adapter_id(6))  # not there yet
    bring(made, 6)
    bring(made, 1, 2, 3)
    assert made.is_resident(adapter_id(6))
    made.check()


def test_pins_leave_room_for_another_adapter() -> None:
    made = world(3 * SLOTS)
    made.residency.pin(adapter_id(0))
    with pytest.raises(PoolTooSmall, match="cannot be pinned: it takes 64 slots"):
        made.residency.pin(adapter_id(1))
    assert not made.residency.adapter_table.get(adapter_id(1)).pinned
    made.check()
