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
    """Load the adapters to the device; the queue is empty afterwards."""
    for i in adapters:
        made.arrive(adapter_id(i))
        made.step()
        made.waiting.clear()
        made.step()
        assert made.is_resident(adapter_id(i))


def fill(made: SwapperWorld, i: int) -> None:
    """Fill the rest of the pool with KV of a resident adapter, one leaf per slot."""
    for token in range(made.cache.allocator.available_size()):
        made.cache_kv(adapter_id(i), [1000 * i + token])


def test_swapper_loads_in_queue_order_a_quarter_of_the_pool_at_a_time() -> None:
    made = world(4 * SLOTS)
    for i in (3, 1, 2):
        made.arrive(adapter_id(i))
    for there in ([3], [1, 3], [1, 2, 3]):  # at most a quarter of the pool is loading at once
        made.step()
        assert resident(made) == there
    made.check()


def test_swapper_loads_no_adapter_beyond_the_queue_lookahead() -> None:
    made = world(200 * SLOTS, num_adapters=LOOKAHEAD + 2)
    for i in range(LOOKAHEAD + 2):
        made.arrive(adapter_id(i))
    for _ in range(LOOKAHEAD):
        made.step()
    assert resident(made) == list(range(LOOKAHEAD))


def test_load_does_not_evict_an_adapter_of_an_earlier_request() -> None:
    """The pool holds three adapters: those of the first three queued requests."""
    made = world(3 * SLOTS + 10)
    bring(made, 0, 1, 2)
    for i in (2, 1, 0, 5):
        made.arrive(adapter_id(i))
    for _ in range(5):
        made.step()
    assert resident(made) == [0, 1, 2]
    del made.waiting[0]  # the request for adapter 2 has run
    for _ in range(3):
        made.step()
    assert resident(made) == [0, 1, 5]
    made.check()


def test_busy_step_evicts_a_few_leaves_for_the_first_queued_load_only() -> None:
    """An adapter takes the slots of 32 leaves; while batches run, a step evicts 3."""
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


def test_delayed_load_completes_though_new_kv_takes_slots_each_step() -> None:
    """New KV takes freed slots before each step; a load that starts over would never complete."""
    made = world(4 * SLOTS)
    bring(made, 7)
    for i in range(made.cache.allocator.available_size()):
        made.cache_kv(adapter_id(7), [i])
    made.arrive(adapter_id(0))
    for i in range(3 * SLOTS):
        if made.is_resident(adapter_id(0)):
            break
        made.step()
        for taken in range(2):  # so that every step has leaves to evict
            if made.cache.allocator.available_size():
                made.cache_kv(adapter_id(7), [1000 + 2 * i + taken])
    assert made.is_resident(adapter_id(0))
    made.check()


@pytest.mark.parametrize(("rest", "is_placed"), [(2 * SLOTS, True), (3 * SLOTS, False)])
def test_load_leaves_room_for_the_rest_of_a_chunked_prefill(rest: int, is_placed: bool) -> None:
    """SGLang allocates the next chunks unconditionally and exits if slots are lacking."""
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


def test_prepare_evicts_kv_in_small_parts_for_the_next_load() -> None:
    """Only KV is evicted, a few leaves at a time, and no more than one load needs."""
    made = world(8 * SLOTS, num_adapters=30)
    bring(made, *range(20))  # so that loads of this size are usual
    made.cache.evict(5 * SLOTS)
    there = resident(made)
    fill(made, there[-1])
    for i in there:
        made.core.visit(made.core.node_of(adapter_id(i)).id)
    before = made.residency.statistics()["kv_slots_evicted"]
    made.step()
    assert made.cache.allocator.available_size() == 0  # no eviction before a batch
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


def test_prepare_evicts_nothing_while_no_load_is_expected() -> None:
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


def test_prepare_evicts_no_adapter_for_the_next_load() -> None:
    made = world(4 * SLOTS)
    bring(made, *range(12))
    for _ in range(20):
        made.swapper.prepare()
    assert resident(made) == [8, 9, 10, 11]


def test_idle_step_evicts_and_loads_in_one_step() -> None:
    made = world(4 * SLOTS)
    bring(made, 7)
    for i in range(made.cache.allocator.available_size() // 2):
        made.cache_kv(adapter_id(7), [i, 0])
    made.arrive(adapter_id(0))
    made.step(is_busy=False)
    assert resident(made) == [0, 7]


def test_loaded_adapter_is_evictable_once_its_request_is_aborted() -> None:
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


def test_prefetch_loads_back_evicted_adapters_without_evicting() -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10, 11)  # evicts 0 and 1
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
def test_no_prefetch_while_the_pool_is_too_full(in_use: int) -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10)
    for i in range(1, 11 - in_use):
        made.residency.retire(adapter_id(i))
    for _ in range(4):
        made.step()
    assert not made.is_resident(adapter_id(0))
    assert made.residency.statistics()["prefetched_slots"] == 0


def test_prefetched_slots_evicted_unused_count_as_wasted() -> None:
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


def test_no_prefetch_while_a_request_is_queued() -> None:
    made = world(10 * SLOTS)
    bring(made, *range(10))
    bring(made, 10)
    for i in range(1, 8):
        made.residency.retire(adapter_id(i))
    made.arrive(adapter_id(10))
    for _ in range(4):
        made.step()
    assert not made.is_resident(adapter_id(0))


def test_hinted_adapter_loads_after_queued_ones() -> None:
    made = world(4 * SLOTS)
    made.swapper.expect([adapter_id(5)])
    made.arrive(adapter_id(1))
    made.step()
    assert resident(made) == [1]
    made.waiting.clear()
    made.step()
    assert resident(made) == [1, 5]
    made.check()


def test_hinted_load_evicts_no_adapter_of_a_queued_request() -> None:
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


def test_hint_holds_its_adapter_until_used_or_expired() -> None:
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


def test_hint_credit_runs_out_after_unused_hints() -> None:
    true, false = range(2 * MOST_CREDIT), range(2 * MOST_CREDIT, 3 * MOST_CREDIT)
    others = (3 * MOST_CREDIT, 3 * MOST_CREDIT + 1)
    made = world(200 * SLOTS, num_adapters=len(true) + len(false) + len(others))

    def hint(i: int, *, ordered: bool = False) -> bool:
        made.swapper.expect([adapter_id(i)], ordered=ordered)
        for _ in range(2):
            made.step(is_busy=False)  # the next step settles the copy
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


def test_hint_credit_is_restored_over_steps() -> None:
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
def test_failed_read_of_a_hinted_adapter_is_not_retried(ordered: bool) -> None:
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


def test_hint_only_adapters_are_capped() -> None:
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


def test_prefetch_hints_load_one_at_a_time_in_fifo_order() -> None:
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


def test_hints_for_unknown_or_retired_adapters_are_dropped() -> None:
    made = world(8 * SLOTS)
    made.swapper.expect(["nobody", adapter_id(0)])
    made.swapper.expect(f"x{i}" for i in range(1000))
    made.residency.retire(adapter_id(3))
    made.swapper.expect([adapter_id(3)])
    made.step()
    assert resident(made) == [0]
    assert made.residency.statistics()["hints_dropped"] == 1002
    made.check()


def test_evict_order_removes_adapter_and_kv_in_bounded_parts() -> None:
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


def test_evict_order_is_refused_for_used_queued_or_pinned_adapters() -> None:
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
    made.arrive(adapter_id(0))  # the request arrives before the eviction
    made.step()
    made.swapper.prepare()
    assert resident(made) == [0, 1, 2]
    made.check()


def test_pinned_adapter_is_not_evicted_until_unpinned() -> None:
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
    made.residency.pin(adapter_id(6))  # not resident yet
    bring(made, 6)
    bring(made, 1, 2, 3)
    assert made.is_resident(adapter_id(6))
    made.check()


def test_pin_is_refused_if_no_other_adapter_would_fit() -> None:
    made = world(3 * SLOTS)
    made.residency.pin(adapter_id(0))
    with pytest.raises(PoolTooSmall, match="cannot be pinned: it takes 64 slots"):
        made.residency.pin(adapter_id(1))
    assert not made.residency.adapter_table.get(adapter_id(1)).pinned
    made.check()
