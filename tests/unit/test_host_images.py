"""Adapter images between file and host memory: budget, reader threads, and failures."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
import torch

from sglang_elora.pages import (
    AdapterImage,
    AdapterLayout,
    HostArena,
    HostMemoryFull,
    ModuleShape,
)
from sglang_elora.swapper.host_tier import HostTier, HostTierFull
from sglang_elora.swapper.reading import Read

LAYOUT = AdapterLayout.build(4, [ModuleShape("o_proj", 64, (64,))])
IMAGE = AdapterImage.build(
    LAYOUT, 2, lambda *_: (torch.ones(4, 64), torch.ones(64, 4)), torch.float32, 1.0
)
SIZE = IMAGE.nbytes


class Tier(HostTier):
    """A tier whose priorities and queue the test sets, over adapters of 10 bytes each.

    ``queue`` holds the position of each adapter that a request waits for.
    """

    def __init__(self, budget_bytes: int, block_bytes: int = 1) -> None:
        self.rank: dict[str, float] = {}
        self.queue: dict[str, float] = {}
        memory = torch.zeros(budget_bytes, dtype=torch.uint8)
        super().__init__(
            HostArena(memory, block_bytes),
            lambda adapter_id: (
                math.inf if adapter_id in self.queue else self.rank.get(adapter_id, 0.0)
            ),
            lambda adapter_id: self.queue.get(adapter_id, math.inf),
        )

    def know(self, adapter_id: str, read: Callable[[], AdapterImage] = lambda: IMAGE) -> None:
        """An adapter whose file is read by ``read``, wherever to."""
        self.add(adapter_id, 10, lambda chunks: read())

    def want(self, *adapter_ids: str) -> None:
        """Replace the queue by these requests, in this order."""
        left = self.queue.keys() - set(adapter_ids)
        self.queue = {
            adapter_id: float(position) for position, adapter_id in enumerate(adapter_ids)
        }
        for adapter_id in left:
            self.cancel(adapter_id)
            self.lower(adapter_id)

    def step(self) -> dict[str, object]:
        """Run one scheduler step: request reads for queued adapters, complete reads."""
        for adapter_id in self.queue:
            self.request(adapter_id)
        found = self.finish()
        self.drop_surplus()
        self.check_invariants()
        return found

    def bring(self, *adapter_ids: str) -> None:
        """Read the adapters one by one; the queue is empty afterwards."""
        for adapter_id in adapter_ids:
            self.want(adapter_id)
            self.step()
        self.want()

    def finish(self) -> dict[str, object]:
        """Settle all reads as soon as they are over."""
        found = {}
        while self.reading:
            for adapter_id in self.reading:
                code = self.code(adapter_id)
                if code != Read.UNDER_WAY:
                    found[adapter_id] = self.settle(adapter_id, code)
            time.sleep(0.001)
        self.check_invariants()
        return found

    def present(self, adapter_ids: Iterable[str]) -> str:
        return "".join(adapter_id for adapter_id in adapter_ids if adapter_id in self)


def test_host_images_reads_only_requested_adapters() -> None:
    reads = []
    tier = Tier(1000)
    for i in range(2000):
        tier.know(str(i), lambda i=i: reads.append(i) or IMAGE)  # type: ignore[misc]
    assert len(tier) == 0 and tier.num_bytes == 0
    tier.bring("7", "1999")
    assert sorted(reads) == [7, 1999]
    assert "7" in tier and "8" not in tier and tier.num_bytes == 20


def test_repeated_request_reads_the_file_once() -> None:
    reads = []
    tier = Tier(1000)
    tier.know("a", lambda: reads.append(1) or IMAGE)  # type: ignore[func-returns-value]
    tier.request("a")
    tier.request("a")
    tier.finish()
    tier.request("a")
    assert tier.reading == () and reads == [1]
    assert tier.get("a") is IMAGE


def test_read_without_free_memory_drops_the_lowest_ranked_image() -> None:
    tier = Tier(25)
    for adapter_id in "abc":
        tier.know(adapter_id)
    tier.rank = {"a": 2.0, "b": 1.0, "c": 3.0}
    tier.bring("a", "b", "c")
    assert tier.present("abc") == "ac"
    assert tier.num_dropped == 1 and tier.num_bytes == 20


def test_no_image_is_dropped_if_that_would_not_free_enough() -> None:
    tier = Tier(30)
    tier.know("small")
    tier.know("held")
    tier.add("large", 25, lambda chunks: IMAGE)
    tier.bring("small", "held")
    tier.hold("held")
    tier.want("large")
    tier.step()
    assert tier.present(["small", "held", "large"]) == "smallheld" and tier.num_dropped == 0
    tier.release("held")
    tier.step()
    assert tier.present(["small", "held", "large"]) == "large" and tier.num_dropped == 2


def test_held_image_is_not_dropped() -> None:
    tier = Tier(10)
    tier.know("held")
    tier.know("wanted")
    tier.bring("held")
    assert tier.hold("held") is IMAGE
    tier.want("wanted")
    tier.step()
    assert "held" in tier and tier.reading == ()
    tier.release("held")
    tier.step()
    assert "held" not in tier and "wanted" in tier


def test_running_reads_count_against_the_host_budget() -> None:
    gate = threading.Event()
    tier = Tier(25)
    for adapter_id in "abcd":
        tier.know(adapter_id, lambda: gate.wait(10) and IMAGE)  # type: ignore[arg-type, return-value]
    tier.want(*"abcd")
    for adapter_id in "abcd":
        tier.request(adapter_id)
    assert tier.reading == ("a", "b") and tier.arena.num_free == 5
    gate.set()
    tier.finish()
    tier.drop_surplus()
    tier.step()
    assert tier.present("abcd") == "ab", "requests for them come first"
    tier.want("b", "c", "d")  # a's weights are on the device
    tier.step()
    assert tier.present("abcd") == "bc"


def test_earlier_request_takes_host_memory_of_a_later_one() -> None:
    """Requests change places in the queue: the first one gets its adapter in any case."""
    tier = Tier(30)
    for adapter_id in "abcd":
        tier.know(adapter_id)
    tier.want("a", "b", "c")
    tier.step()
    tier.want("d", "b", "c", "a")
    tier.step()
    assert tier.present("abcd") == "bcd"
    tier.want("a", "d", "c", "b")
    tier.step()
    assert tier.present("abcd") == "acd"


def test_freed_host_memory_is_reserved_for_the_first_request() -> None:
    """The first needs more than is free; a small one after it waits until the first is read."""
    tier = Tier(20)
    tier.know("held")
    tier.add("large", 15, lambda chunks: IMAGE)
    tier.know("small")
    tier.bring("held")
    tier.hold("held")
    tier.want("large", "small")
    for _ in range(3):
        tier.step()
    assert "large" not in tier and "small" not in tier
    tier.release("held")
    tier.step()
    assert "large" in tier and "small" not in tier
    tier.want("small")
    tier.step()
    assert "small" in tier


def test_read_without_a_queued_request_drops_no_image() -> None:
    tier = Tier(10)
    tier.know("a")
    tier.know("b")
    tier.bring("a")
    tier.request("b")
    tier.read_ahead()
    assert tier.reading == () and "a" in tier


@pytest.mark.parametrize("budget", [0, 9, 19])
def test_adapter_larger_than_the_host_budget_is_read_for_each_use(
    budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    chunks: list[torch.Tensor] = []
    tier = Tier(budget)
    tier.add("a", 20, lambda given: chunks.extend(given) or IMAGE)  # type: ignore[func-returns-value]
    for num_reads in range(1, 4):
        tier.want("a")
        tier.step()
        assert "a" in tier and len(chunks[-1]) == 20
        tier.hold("a")
        tier.want()
        tier.step()
        assert "a" in tier, "it is copied from"
        tier.release("a")
        tier.step()
        assert "a" not in tier and tier.num_reads == num_reads
    assert tier.num_outside == 3 and tier.arena.num_free == budget
    assert caplog.text.count("--elora-host-gb has no room for an adapter of 20 bytes") == 1
    tier.request("a")  # no request waits for it, so it would be dropped at once
    assert tier.reading == ()


def test_images_outside_the_arena_are_few_and_go_to_first_requests() -> None:
    tier = Tier(0)
    for adapter_id in "abcd":
        tier.know(adapter_id)
    tier.want("a", "b", "c")
    tier.step()
    assert tier.present("abcd") == "ab"
    tier.want("d", "c", "b", "a")
    tier.step()
    assert tier.present("abcd") == "cd"
    tier.hold("d")
    tier.want("b", "c")
    tier.step()
    assert tier.present("abcd") == "bd"
    tier.release("d")
    tier.want()
    tier.step()
    assert len(tier) == 0 and tier.num_bytes == 0


def test_failed_allocation_outside_the_arena_names_the_flag() -> None:
    tier = Tier(5)
    tier.add("a", 2**62, lambda chunks: IMAGE)
    tier.want("a")
    error = tier.step()["a"]
    assert isinstance(error, HostMemoryFull) and "--elora-host-gb" in str(error)


def test_dropped_adapter_is_read_again() -> None:
    tier = Tier(10)
    tier.know("a")
    tier.know("b")
    for _ in range(3):
        tier.bring("a")
        assert "a" in tier
        tier.bring("b")
        assert "a" not in tier
    assert tier.num_reads == 6


def test_image_without_a_file_is_copied_to_the_arena_and_kept() -> None:
    tier = Tier(5 * SIZE // 2)
    tier.add("sent", SIZE, image=IMAGE)
    assert tier.get("sent") is not IMAGE and tier.get("sent").version == IMAGE.version
    assert tier.arena.num_free == 3 * SIZE // 2
    tier.add("a", SIZE, lambda chunks: IMAGE)
    tier.add("b", SIZE, lambda chunks: IMAGE)
    tier.bring("a", "b")
    assert tier.present(["sent", "a", "b"]) == "sentb" and tier.num_dropped == 1
    with pytest.raises(HostTierFull, match=f"--elora-host-gb leaves {3 * SIZE // 2} bytes"):
        tier.add("too large", 2 * SIZE, image=IMAGE)
    assert tier.num_bytes == 2 * SIZE
    tier.remove("sent")
    assert tier.arena.num_free == 3 * SIZE // 2
    tier.add("fits now", SIZE, image=IMAGE)
    tier.add("too", SIZE, image=IMAGE)
    assert tier.present(["fits now", "too", "b"]) == "fits nowtoo"
    tier.check_invariants()


def test_image_without_a_file_gets_freed_blocks_before_any_read() -> None:
    """The blocks are in use by copies; the image is served from its own memory."""
    tier = Tier(2 * SIZE)
    for adapter_id in "abc":
        tier.add(adapter_id, SIZE, lambda chunks: IMAGE)
    tier.bring("a", "b")
    tier.hold("a")
    tier.hold("b")
    tier.add("sent", SIZE, image=IMAGE)
    assert tier.hold("sent") is IMAGE
    tier.release("b")
    tier.want("c")
    tier.step()
    assert tier.get("sent") is IMAGE and "c" not in tier, "it is copied from itself"
    tier.release("sent")
    tier.step()
    assert tier.get("sent") is not IMAGE and tier.get("sent").version == IMAGE.version
    assert tier.present("abc") == "a"
    tier.release("a")
    tier.step()
    assert tier.present("abc") == "c"


def test_ranks_with_different_read_speeds_read_and_drop_alike() -> None:
    """Two ranks act on the minimum of their codes in each step, and drop the same images."""
    rng = random.Random(0)
    delays = [0.0, 0.002]
    ranks = [Tier(35) for _ in delays]
    sizes = {f"{i:02}": rng.choice((8, 10, 16, 24, 40)) for i in range(20)}
    for tier, delay_s in zip(ranks, delays, strict=True):
        for adapter_id, size in sizes.items():
            tier.add(adapter_id, size, partial(slowly, delay_s))
    done: list[set[str]] = [set(), set()]
    for step in range(300):
        wanted = [] if step % 7 == 6 else rng.sample(list(sizes), 3)
        for tier in ranks:
            tier.want(*wanted)
            for adapter_id in wanted:
                tier.request(adapter_id)
        assert ranks[0].reading == ranks[1].reading
        for adapter_id in ranks[0].reading:
            code = min(tier.code(adapter_id) for tier in ranks)
            for tier, came in zip(ranks, done, strict=True):
                if tier.settle(adapter_id, code) is not None:
                    came.add(adapter_id)
                    tier.rank[adapter_id] = step
        for tier in ranks:
            tier.drop_surplus()
            tier.check_invariants()
        assert len({tuple(adapter_id in tier for adapter_id in sizes) for tier in ranks}) == 1
        assert ranks[0].arena.num_free == ranks[1].arena.num_free
        time.sleep(0.001 * (step % 3 == 0))
    assert done[0] == done[1] and len(done[0]) > 10
    assert ranks[0].num_dropped == ranks[1].num_dropped > 10 and ranks[0].num_outside > 0


def slowly(delay_s: float, chunks: Sequence[torch.Tensor]) -> AdapterImage:
    time.sleep(delay_s)
    return IMAGE


def test_failed_read_is_settled_once_no_rank_is_reading() -> None:
    """Otherwise a rank would wait for its reader, or free what the reader writes to."""
    gate = threading.Event()
    failing, slow = Tier(10), Tier(10)
    failing.know("a", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    slow.know("a", lambda: gate.wait(10) and IMAGE)  # type: ignore[arg-type, return-value]
    for tier in (failing, slow):
        tier.want("a")
        tier.request("a")
    while failing.code("a") == Read.UNDER_WAY:
        time.sleep(0.001)
    assert min(tier.code("a") for tier in (failing, slow)) == Read.UNDER_WAY
    gate.set()
    while slow.code("a") == Read.UNDER_WAY:
        time.sleep(0.001)
    code = min(tier.code("a") for tier in (failing, slow))
    assert code == Read.FAILED
    assert isinstance(failing.settle("a", code), ZeroDivisionError)
    assert "another rank" in str(slow.settle("a", code))
    assert failing.arena.num_free == slow.arena.num_free == 10


def test_unload_frees_blocks_once_no_reader_or_copy_uses_them() -> None:
    gate = threading.Event()
    freed: list[int] = []
    tier = Tier(30)
    tier.arena.on_freed = lambda block: freed.append(len(block))
    tier.know("idle")
    tier.know("held")
    tier.know("read", lambda: gate.wait(10) and IMAGE)  # type: ignore[arg-type, return-value]
    tier.bring("idle", "held")
    tier.hold("held")
    tier.want("read")
    tier.request("read")
    for adapter_id in ("idle", "held", "read"):
        tier.remove(adapter_id)
        assert adapter_id not in tier
    tier.queue.clear()
    tier.check_invariants()
    assert tier.num_bytes == 0 and freed == [10], "idle"
    assert tier.code("read") == Read.UNDER_WAY, "its reader writes to them"
    tier.release("held")
    assert freed == [10, 10]
    gate.set()
    assert tier.finish() == {"read": None}
    assert freed == [10, 10, 10] and tier.arena.num_free == 30


def test_failed_read_is_reported_and_the_next_one_is_tried() -> None:
    answers: list[AdapterImage | Exception] = [FileNotFoundError("gone"), IMAGE]

    def read() -> AdapterImage:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    tier = Tier(100)
    tier.know("a", read)
    tier.request("a")
    assert str(tier.finish()["a"]) == "gone"
    assert "a" not in tier
    tier.request("a")
    assert tier.finish()["a"] is IMAGE


def test_read_that_failed_on_another_rank_is_discarded() -> None:
    tier = Tier(100)
    tier.know("a")
    tier.request("a")
    while tier.code("a") == Read.UNDER_WAY:
        time.sleep(0.001)
    assert tier.code("a") == Read.DONE
    assert "another rank" in str(tier.settle("a", Read.FAILED))
    assert "a" not in tier and tier.reading == ()


def test_cancelled_read_is_not_started() -> None:
    gate, started = threading.Event(), []

    def slow(name: str) -> AdapterImage:
        started.append(name)
        gate.wait(10)
        return IMAGE

    tier = Tier(100)
    for name in "abcd":
        tier.know(name, lambda name=name: slow(name))  # type: ignore[misc]
        tier.request(name)
    tier.cancel("c")
    tier.cancel("d")
    tier.request("d")  # requested again
    gate.set()
    found = tier.finish()
    assert sorted(started) == ["a", "b", "d"]
    assert found["c"] is None and found["d"] is IMAGE


def test_adapter_removed_during_its_read_is_not_stored() -> None:
    gate = threading.Event()
    tier = Tier(100)
    tier.know("a", lambda: gate.wait(10) and IMAGE)  # type: ignore[arg-type, return-value]
    tier.request("a")
    tier.remove("a")
    gate.set()
    assert tier.finish() == {"a": None}
    assert tier.num_bytes == 0
