"""The planner on the simulator's memory: what it loads, evicts and keeps, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.config import POLICIES
from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import CacheEntry, Costs, PolicyContext, make_policy
from sglang_elora.sim import Calibration
from sglang_elora.sim.cache import Cache
from sglang_elora.sim.link import Link
from sglang_elora.sim.memory import PoolMemory
from sglang_elora.sim.segment import Segment
from sglang_elora.swapper.planner import (
    LOOKAHEAD,
    ROOM_LEAVES,
    ROOM_RETRY,
    WORK_PER_STEP,
    Planner,
)
from sglang_elora.tree import AdapterTable, Eviction

CPU = Calibration.load(Path(__file__).resolve().parents[2] / "benchmarks/sim/cpu.json")
SLOTS = 64  # of an adapter


@dataclass(frozen=True)
class Request:
    lora_id: str | None
    num_tokens: int = 1

    @property
    def origin_input_ids(self) -> range:
        return range(self.num_tokens)


class World:
    """A pool with adapters ``a0``, ``a1``, … in host memory, and a queue.

    Args:
        host_adapters: How many fit into host memory; 0 for all.
    """

    def __init__(
        self, num_slots: int, *, policy: str = "lru", host_adapters: int = 0, host_slots: int = 0
    ) -> None:
        adapter_table = AdapterTable()
        for i in range(2 * LOOKAHEAD):
            adapter_table.register(f"a{i}", num_slots=SLOTS, pinned=False, version="")
        calibration = replace(
            CPU,
            pool_slots=num_slots,
            adapter_slots=(SLOTS,),
            host_slots=host_slots,
            adapter_host_slots=host_adapters * SLOTS,
            file_bytes_per_s=SLOTS * CPU.slot_bytes / 1.0,  # one second per file
            link_bytes_per_s=SLOTS * CPU.slot_bytes / 0.1,
            link_latency_s=0.0,
        )
        costs = OnlineCosts()
        made = make_policy(policy, PolicyContext(costs.costs, writes_back=host_slots > 0))
        self.cache = Cache(made, adapter_table, num_slots, host_slots)
        self.memory = PoolMemory(self.cache, calibration, Link(calibration), costs)
        self.planner: Planner[Segment] = Planner(self.memory, costs)
        self.queue: list[Any] = []
        self.now_s = 0.0

    def step(self, seconds: float = 0.2, *, is_busy: bool = True) -> None:
        """One iteration; copies that take less than ``seconds`` end before the next one."""
        self.memory.settle(self.now_s)
        self.planner.begin_step(is_busy=is_busy)
        self.planner.load(self.queue)
        self.planner.load_session()
        self.planner.read_ahead(self.queue, is_busy=is_busy)
        self.now_s += seconds
        self.cache.check_invariants(0)

    def load(self, *adapters: int) -> None:
        """Load adapters, with nothing queued afterwards."""
        for i in adapters:
            self.queue = [Request(f"a{i}")]
            self.step()
            self.queue = []
            self.step()
            assert i in self.resident()

    def cache_kv(self, i: int, num_slots: int) -> Segment:
        """KV of an adapter that is on the device, as one leaf."""
        adapter = self.cache.adapter(f"a{i}")
        leaf = Segment(CacheEntry(False, num_slots, f"a{i}"), adapter.adapter, adapter)
        self.cache.place(leaf)
        return leaf

    def resident(self) -> list[int]:
        return [i for i, adapter in enumerate(self.cache.adapter_table) if adapter.resident]


def test_planner_loads_in_queue_order_a_quarter_of_the_pool_at_a_time() -> None:
    world = World(4 * SLOTS)
    world.queue = [Request(f"a{i}") for i in (3, 1, 2)]
    for expected in ([3], [1, 3], [1, 2, 3]):
        world.step()
        assert world.resident() == expected


def test_planner_loads_nothing_beyond_the_queue_lookahead() -> None:
    world = World(200 * SLOTS)
    world.queue = [Request(f"a{i}") for i in range(LOOKAHEAD + 2)]
    for _ in range(LOOKAHEAD):
        world.step()
    assert world.resident() == list(range(LOOKAHEAD))


def test_planner_evicts_no_adapter_of_an_earlier_request() -> None:
    world = World(3 * SLOTS + 10)
    world.load(0, 1, 2)
    world.queue = [Request(f"a{i}") for i in (2, 1, 0, 5)]
    for _ in range(5):
        world.step()
    assert world.resident() == [0, 1, 2]


def test_planner_bounds_evictions_per_busy_step_but_not_when_idle() -> None:
    world = World(2 * SLOTS)
    world.load(0)
    for _ in range(SLOTS // 2):
        world.cache_kv(0, 2)
    world.queue = [Request("a1")]
    world.step()
    assert world.cache.free == 2 * WORK_PER_STEP and world.planner.is_limited
    world.step(is_busy=False)
    assert world.resident() == [0, 1] and not world.planner.is_limited


def test_planner_evicts_kv_in_small_parts_for_the_next_load() -> None:
    world = World(4 * SLOTS)
    world.load(0, 1)
    for _ in range(2 * SLOTS):
        world.cache_kv(1, 1)
    world.cache.policy.visit([world.cache.adapter(f"a{i}").entry for i in (0, 1)])
    free = world.cache.free
    assert free == 0
    for _ in range(SLOTS):
        world.planner.prepare()
        assert world.cache.free - free <= ROOM_LEAVES
        free = world.cache.free
    assert world.cache.free == SLOTS and world.resident() == [0, 1]


def test_planner_without_room_searches_again_after_some_batches_or_a_copy() -> None:
    world = World(4 * SLOTS, host_slots=100 * SLOTS)
    world.load(0, 1)
    for _ in range(2 * SLOTS):
        world.cache_kv(1, 1)
    memory, tries = world.memory, 0
    evict = memory.evict_without_copies

    def counted(eviction: Eviction) -> int:
        nonlocal tries
        tries += 1
        return evict(replace(eviction, max_leaves=0))  # each victim would have to be copied

    memory.evict_without_copies = counted  # type: ignore[method-assign]
    memory._to_host_free_s = math.inf  # a copy to the host is in progress
    for _ in range(4 * ROOM_RETRY):
        world.planner.prepare()
        memory.num_launches += 1
    assert tries == 4
    memory._to_host_free_s = 0.0
    assert world.planner.prepare() and tries == 5  # copies the next victims
    world.planner.prepare()
    assert tries == 6


def test_planner_loads_evicted_adapters_back_into_free_slots_only() -> None:
    world = World(11 * SLOTS)
    world.load(*range(11))
    world.cache.evict(Eviction(8 * SLOTS))
    evicted = set(range(11)) - set(world.resident())
    world.step()
    assert len(evicted & set(world.resident())) == 1
    for _ in range(20):
        world.step()
    assert len(world.resident()) == 7  # 70% of the pool


def test_planner_loads_hinted_after_queued_without_evicting_those() -> None:
    world = World(3 * SLOTS + 10)
    world.load(0, 1, 2)
    world.queue = [Request("a0"), Request("a1")]
    assert world.planner.expect(["a7", "unknown"]) == 1
    for _ in range(3):
        world.step()
    assert world.resident() == [0, 1, 7]
    world.queue.append(Request("a2"))
    for _ in range(3):
        world.step()
    assert world.resident() == [0, 1, 2]
    assert world.memory.counts.hints == world.memory.counts.hints_dropped == 1


def test_planner_reads_the_file_before_the_adapter_is_copied() -> None:
    world = World(4 * SLOTS, host_adapters=2)
    world.queue = [Request("a5")]
    world.step(0.5)
    assert [*world.memory.reading] == ["a5"] and world.resident() == []
    world.step(0.6)
    world.step()
    assert world.resident() == [5] and not world.memory.reading


def test_full_host_memory_drops_the_image_needed_last() -> None:
    world = World(8 * SLOTS, host_adapters=2)
    for i in (0, 1):
        world.planner.expect([f"a{i}"], ordered=True)
    for _ in range(20):
        world.step(0.5)
    world.queue = [Request("a3"), Request("a4")]
    for _ in range(10):
        world.step(0.5)
    assert {3, 4} <= set(world.resident())


def test_idle_planner_reads_files_ahead_until_host_memory_is_full() -> None:
    world = World(4 * SLOTS, host_adapters=3)
    for _ in range(10):
        world.step(1.1, is_busy=False)
    assert [i for i in range(6) if world.memory.is_on_host(f"a{i}")] == [0, 1, 2]


def test_announced_session_kv_loads_once_its_adapter_is_resident() -> None:
    world = World(4 * SLOTS, host_slots=10 * SLOTS)
    world.load(0)
    end = world.cache_kv(0, 30)
    world.cache.sessions.turn("talk", end)
    world.cache._to_host(end)
    world.cache.evict(Eviction(4 * SLOTS))
    assert world.resident() == [] and not end.on_device
    assert world.planner.expect_sessions(["talk", "unknown"]) == 1
    world.queue = [Request("a0")]
    world.step()
    assert world.resident() == [0] and end.on_device and end.entry.prefetched


@pytest.mark.parametrize("name", POLICIES)
def test_every_configured_policy_is_registered_under_its_name(name: str) -> None:
    assert make_policy(name, PolicyContext(Costs())).name == name


def test_unknown_policy_is_refused_listing_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"policy 'fifo' must be one of .*elora_paper"):
        make_policy("fifo", PolicyContext(Costs()))
