"""A device whose streams run as late, or as early, as CUDA permits."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from sglang_elora.platforms.async_device import (
    PATIENCE,
    AsyncDevice,
    Event,
    Order,
    Stream,
    StreamContext,
)
from sglang_elora.platforms.race_check import Access, RaceError

ORDERS = [(Order.LATEST, 0), (Order.EARLIEST, 0), *((Order.RANDOM, seed) for seed in range(4))]


def slots(*numbers: int) -> list[Access]:
    return [("pool", np.array(numbers, np.int64))]


class DeviceWorld:
    """A forward stream and a copy stream, and a journal of what ran when."""

    def __init__(self, order: Order, seed: int = 0) -> None:
        self.device = AsyncDevice(order, seed)
        self.forward, self.copies = Stream(self.device), Stream(self.device)
        self.forward.asynchronous = self.copies.asynchronous = True
        self.journal: list[str] = []

    def copy(self, name: str, *written: int, poison: bool = False) -> Event:
        with StreamContext(self.copies):
            self.device.launch(
                name,
                lambda: self.journal.append(name),
                writes=slots(*written),
                poison=(lambda: self.journal.append(f"poison {name}")) if poison else None,
            )
        return self.copies.record_event()

    def run(self, name: str, *read: int, inside: Callable[[], None] = lambda: None) -> Event:
        def forward() -> None:
            inside()
            self.journal.append(name)

        with StreamContext(self.forward):
            self.device.launch(name, forward, reads=slots(*read), is_forward=True)
        return self.forward.record_event()


def test_latest_order_runs_a_copy_when_a_batch_waits_for_it() -> None:
    world = DeviceWorld(Order.LATEST)
    there = world.copy("copy", 1, poison=True)
    assert world.journal == ["poison copy"]
    world.run("batch", 1, inside=there.wait)
    assert world.journal == ["poison copy", "copy", "batch"]


def test_latest_order_runs_each_copied_layer_when_it_is_waited_for() -> None:
    world = DeviceWorld(Order.LATEST)
    first, second = world.copy("layer 0", 1, poison=True), world.copy("layer 1", 1, poison=True)

    def layers() -> None:
        first.wait()
        world.journal.append("computed layer 0")
        second.wait()

    world.run("batch", 1, inside=layers)
    assert world.journal == [
        *("poison layer 0", "poison layer 1"),
        *("layer 0", "computed layer 0", "layer 1", "batch"),
    ]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_batch_that_does_not_wait_for_a_copy_is_a_race(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    world.copy("copy", 1)
    with pytest.raises(RaceError, match=r"batch .* after a copy .* reads pool that it wrote"):
        world.run("batch", 1, 2).synchronize()


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_copy_that_does_not_wait_for_a_batch_is_a_race(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    world.run("batch", 1, 2)
    with pytest.raises(RaceError, match=r"copy .* after a batch .* writes pool that it read"):
        world.copy("copy", 2).synchronize()


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_every_order_respects_event_dependencies(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    before = world.run("batch 1", 1)
    world.copies.wait_event(before)
    there = world.copy("copy", 1)
    world.run("batch 2", 1, inside=there.wait).synchronize()
    assert world.journal == ["batch 1", "copy", "batch 2"]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_wait_stream_orders_all_earlier_launches(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    for name in ("batch 1", "batch 2"):
        world.run(name, 1)
    world.copies.wait_stream(world.forward)
    world.copy("copy", 1).synchronize()
    assert world.journal == ["batch 1", "batch 2", "copy"]


def test_earliest_order_runs_a_copy_before_a_batch_it_ignores() -> None:
    world = DeviceWorld(Order.EARLIEST)
    done = world.run("batch", 1)
    world.copy("copy", 2)
    done.synchronize()
    assert world.journal == ["copy", "batch"]


def test_earliest_order_runs_a_waiting_copy_right_after_the_batch() -> None:
    world = DeviceWorld(Order.EARLIEST)
    done = world.run("batch", 1)
    world.copies.wait_event(done)
    world.copy("copy", 1)
    assert world.journal == []
    done.synchronize()
    assert world.journal == ["batch", "copy"]


def test_event_query_is_false_a_few_times_then_completes_the_work() -> None:
    world = DeviceWorld(Order.LATEST)
    there = world.copy("copy", 1)
    assert [there.query() for _ in range(PATIENCE + 1)] == [False] * PATIENCE + [True]
    world.run("batch", 1)  # the host had seen the copy complete before this launch
    assert world.journal == ["copy", "batch"]


def test_host_synchronize_orders_later_launches() -> None:
    world = DeviceWorld(Order.LATEST)
    world.run("batch", 1).synchronize()
    world.copy("copy", 1).synchronize()
    assert world.journal == ["batch", "copy"]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_host_reuse_of_memory_of_a_running_copy_is_a_race(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    there = world.copy("copy", 1, 2)
    world.device.host_writes("reuse", "pool", np.array([3]))
    with pytest.raises(RaceError, match=r"nothing orders a reuse .* after a copy"):
        world.device.host_writes("reuse", "pool", np.array([2, 3]))
    there.synchronize()
    world.device.host_writes("reuse", "pool", np.array([1, 2]))
    world.copy("next copy", 1, 2)  # ordered after the host, which launches it
    world.device.synchronize()


def test_event_recorded_before_its_copy_does_not_order_it() -> None:
    world = DeviceWorld(Order.LATEST)
    early = world.copies.record_event()
    world.copy("copy", 1)
    with pytest.raises(RaceError, match="batch"):
        world.run("batch", 1, inside=early.wait)


def test_memory_read_by_a_running_operation_is_not_poisoned() -> None:
    world = DeviceWorld(Order.LATEST)
    backups = Stream(world.device)
    backups.asynchronous = True
    with StreamContext(backups):
        world.device.launch("backup", lambda: world.journal.append("backup"), reads=slots(1, 2))
    assert world.device.idle("pool", np.array([1, 2, 3], np.int64)).tolist() == [3]
    world.copies.wait_event(backups.record_event())
    world.copy("copy", 2, poison=True).synchronize()
    assert world.journal == ["backup", "copy"]


def test_host_stream_runs_its_operations_at_once() -> None:
    world = DeviceWorld(Order.LATEST)
    there = world.copy("copy", 1)
    there.wait(world.device.stream)
    assert world.journal == ["copy"]
    world.device.launch("sum", lambda: world.journal.append("sum"), reads=slots(1))
    assert world.journal == ["copy", "sum"]


def test_failed_operation_completes_and_raises_at_the_waiter() -> None:
    world = DeviceWorld(Order.LATEST)

    def fail() -> None:
        raise OSError("the link broke")

    with StreamContext(world.copies):
        world.device.launch("copy", fail)
    event = world.copies.record_event()
    with pytest.raises(OSError, match="the link broke"):
        event.synchronize()
    assert event.query()


def test_race_is_reported_if_poison_made_an_operation_fail() -> None:
    world = DeviceWorld(Order.LATEST)
    world.copy("copy", 1)

    def use_poison() -> None:
        raise IndexError("index out of range")

    with pytest.raises(RaceError, match="batch"):
        world.run("batch", 1, inside=use_poison)


def test_device_synchronize_completes_all_operations() -> None:
    world = DeviceWorld(Order.LATEST)
    for number in range(3):
        world.copy(f"copy {number}", number)
    world.device.synchronize()
    assert world.journal == ["copy 0", "copy 1", "copy 2"]
    assert world.device.num_operations == world.device.num_delayed == 3


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_elapsed_time_is_how_long_operations_ran_whenever_they_ran(order: Order, seed: int) -> None:
    world = DeviceWorld(order, seed)
    with StreamContext(world.forward):
        world.device.launch("first", lambda: time.sleep(0.2), is_forward=True)
    begun = world.forward.record_event()
    ended = world.run("second", inside=lambda: time.sleep(0.01))
    time.sleep(0.2)  # the host's time is not the stream's
    ended.synchronize()
    assert 10 <= begun.elapsed_time(ended) < 200
    assert begun.elapsed_time(begun) == 0


def test_elapsed_time_of_pending_operations_is_an_error() -> None:
    world = DeviceWorld(Order.LATEST)
    begun = world.copies.record_event()
    ended = world.copy("copy", 1)
    with pytest.raises(RuntimeError, match="must be completed"):
        begun.elapsed_time(ended)
