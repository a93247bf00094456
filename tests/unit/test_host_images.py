"""Adapters between file and host memory: a budget, threads that read, and what may go wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from sglang_elora.pages import AdapterImage, AdapterLayout, ModuleShape
from sglang_elora.swapper import HostTier, HostTierFull, Read

LAYOUT = AdapterLayout.build(4, [ModuleShape("o_proj", 64, (64,))])
IMAGE = AdapterImage.build(
    LAYOUT, 2, lambda *_: (torch.ones(4, 64), torch.ones(64, 4)), torch.float32, 1.0
)


class Tier(HostTier):
    """A tier whose priorities the test sets, over adapters of 10 bytes each."""

    def __init__(self, budget_bytes: int) -> None:
        self.rank: dict[str, float] = {}
        super().__init__(budget_bytes, lambda uid: self.rank.get(uid, 0.0))

    def know(self, uid: str, read: Callable[[], AdapterImage] = lambda: IMAGE) -> None:
        self.add(uid, 10, read)

    def bring(self, *uids: str) -> None:
        for uid in uids:
            self.request(uid)
        self.finish()

    def finish(self) -> dict[str, object]:
        """Settle all reads as soon as they are over."""
        found = {}
        while self.reading:
            for uid in self.reading:
                code = self.code(uid)
                if code != Read.UNDER_WAY:
                    found[uid] = self.settle(uid, code)
            time.sleep(0.001)
        self.check_invariants()
        return found


def test_nothing_is_read_before_it_is_asked_for() -> None:
    reads = []
    tier = Tier(1000)
    for i in range(2000):
        tier.know(str(i), lambda i=i: reads.append(i) or IMAGE)  # type: ignore[misc]
    assert len(tier) == 0 and tier.num_bytes == 0
    tier.bring("7", "1999")
    assert sorted(reads) == [7, 1999]
    assert "7" in tier and "8" not in tier and tier.num_bytes == 20


def test_with_time_to_spare_files_are_read_in_their_order_as_far_as_there_is_room() -> None:
    reads: list[str] = []
    tier = Tier(35)
    for uid in "abcde":
        tier.know(uid, lambda uid=uid: reads.append(uid) or IMAGE)  # type: ignore[misc]
    tier.bring("b")
    tier.remove("c")
    for _ in range(5):
        tier.read_ahead()
        assert len(tier.reading) <= 1
        tier.finish()
    assert reads == ["b", "a", "d"] and tier.num_bytes == 30
    tier.drop("a")  # what was dropped for others is not read again for nobody
    tier.read_ahead()
    tier.finish()
    assert reads == ["b", "a", "d", "e"]


def test_asking_twice_reads_once() -> None:
    reads = []
    tier = Tier(1000)
    tier.know("a", lambda: reads.append(1) or IMAGE)  # type: ignore[func-returns-value]
    tier.request("a")
    tier.request("a")
    tier.finish()
    tier.request("a")
    assert tier.reading == () and reads == [1]
    assert tier.get("a") is IMAGE


def test_what_is_above_the_budget_goes_lowest_first() -> None:
    tier = Tier(20)
    for uid in "abc":
        tier.know(uid)
    tier.rank = {"a": 2.0, "b": 1.0, "c": 3.0}
    tier.bring("a", "b", "c")
    tier.drop_surplus()
    assert [uid in tier for uid in "abc"] == [True, False, True]
    assert tier.num_dropped == 1
    tier.check_invariants()


def test_what_is_held_or_wanted_stays() -> None:
    tier = Tier(0)
    tier.know("held")
    tier.know("wanted")
    tier.rank["wanted"] = float("inf")
    tier.bring("held", "wanted")
    assert tier.hold("held") is IMAGE
    tier.drop_surplus()
    assert "held" in tier and "wanted" in tier
    tier.release("held")
    tier.rank["wanted"] = 1.0
    tier.lower("wanted")
    tier.drop_surplus()
    assert len(tier) == 0 and tier.num_bytes == 0
    tier.check_invariants()


def test_a_dropped_adapter_is_read_again() -> None:
    tier = Tier(0)
    tier.know("a")
    for _ in range(3):
        tier.bring("a")
        assert "a" in tier
        tier.drop_surplus()
        assert "a" not in tier
    assert tier.num_reads == 3


def test_an_image_without_a_file_is_never_dropped() -> None:
    tier = Tier(25)
    tier.add("sent", 10, image=IMAGE)
    tier.know("a")
    tier.know("b")
    tier.bring("a", "b")
    tier.drop_surplus()
    assert "sent" in tier and len(tier) == 2
    with pytest.raises(HostTierFull, match="--elora-host-gb leaves 15 bytes"):
        tier.add("too large", 16, image=IMAGE)
    assert tier.num_bytes == 20
    tier.remove("sent")
    tier.add("fits now", 16, image=IMAGE)
    tier.drop_surplus()
    assert "fits now" in tier and tier.num_bytes <= 26
    tier.check_invariants()


def test_a_failed_read_is_told_and_the_next_one_is_tried() -> None:
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


def test_what_another_rank_could_not_read_nobody_has() -> None:
    tier = Tier(100)
    tier.know("a")
    tier.request("a")
    while tier.code("a") == Read.UNDER_WAY:
        time.sleep(0.001)
    assert tier.code("a") == Read.DONE
    assert "another rank" in str(tier.settle("a", Read.FAILED))
    assert "a" not in tier and tier.reading == ()


def test_a_read_that_nobody_wants_is_not_started() -> None:
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
    tier.request("d")  # somebody came back
    gate.set()
    found = tier.finish()
    assert sorted(started) == ["a", "b", "d"]
    assert found["c"] is None and found["d"] is IMAGE


def test_an_adapter_that_is_removed_while_it_is_read() -> None:
    gate = threading.Event()
    tier = Tier(100)
    tier.know("a", lambda: gate.wait(10) and IMAGE)  # type: ignore[arg-type, return-value]
    tier.request("a")
    tier.remove("a")
    gate.set()
    assert tier.finish() == {"a": None}
    assert tier.num_bytes == 0
