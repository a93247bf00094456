"""Adapters are loaded, used and unloaded repeatedly, each with a new id: no container grows."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_elora.pages import AdapterImage
from tests.harness.object_sizes import sizes_of
from tests.harness.swapper_world import AdapterSource, SwapperWorld, adapter_id

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang_elora.srt.scheduler.admission import Admission

SLOTS = 64  # of an adapter
GIVE_WAY_S = 20e-6  # to the threads that read, as the server does while it is idle
SAMPLE = 250  # ids between two measurements
MOST_MORE = 100
"""Entries by which a container may be larger than before: heaps keep up to 64 that are replaced."""

MOST_MORE_BYTES = 8 * 2**20


class Endless:
    """A world whose adapters have files, each with an id that was never used before."""

    def __init__(self, policy: str) -> None:
        self.world = SwapperWorld(
            4 * SLOTS, num_adapters=1, adapter_slots=SLOTS, policy=policy, host_bytes=100_000
        )
        self.admission: Any = Admission(self.world.residency, self.world.swapper, max_adapters=8)
        self.image = self.world.host.get(adapter_id(0))
        self.num_ids = 0
        self.others: list[str] = []  # still loaded

    def new(self) -> str:
        self.num_ids += 1
        name = adapter_id(self.num_ids)
        image = self.image
        read = partial(_read, image)
        source = AdapterSource(name, name, image.layout, image.nbytes, False, read=read)
        self.world.residency.register(source)
        return name

    def use(self, name: str) -> None:
        """Queue a request, wait until its adapter is resident, run it and cache its KV."""
        world = self.world
        world.arrive(name)
        deadline = time.monotonic() + 10
        while not world.is_resident(name):
            assert time.monotonic() < deadline
            world.step(is_busy=False)
            time.sleep(GIVE_WAY_S)
        world.waiting.clear()
        world.swapper.used(name)
        world.cache_kv(name, [self.num_ids, 1])
        world.step(is_busy=False)

    def unload(self, name: str) -> None:
        self.world.residency.retire(name)
        self.admission.begin_pass(None)  # locked KV is removed then, or by an idle step

    def cycle(self) -> None:
        """Use one adapter once, and abort the load of another."""
        name = self.new()
        self.use(name)
        self.others.append(name)
        if len(self.others) > 6:  # more than the device has room for
            self.unload(self.others.pop(0))
        kind = self.num_ids % 4
        stray = self.new()
        if kind == 0:
            self.world.swapper.expect([stray])
        elif kind == 1:
            self.world.arrive(stray)
        self.world.step(is_busy=kind < 3)
        self.world.waiting.clear()
        self.unload(stray)

    def rest(self) -> None:
        """Run idle steps until no load is running and no request is queued."""
        deadline = time.monotonic() + 10
        while self.world.swapper.is_waiting:
            assert time.monotonic() < deadline
            self.world.step(is_busy=False)
            time.sleep(GIVE_WAY_S)
        for _ in range(4):
            self.world.step(is_busy=False)
        self.admission.begin_pass(None)


def _read(image: AdapterImage, chunks: Sequence[torch.Tensor]) -> AdapterImage:
    return image.copied_to(chunks)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(endless: Endless, num_ids: int) -> tuple[Counter[str], int]:
    """The largest sizes seen, and what the process takes at the end."""
    most: Counter[str] = Counter()
    world: Any = endless.world
    roots = (world.residency, world.core, world.swapper, world.measured, world.host, world.cache)
    while endless.num_ids < num_ids:
        endless.cycle()
        if endless.num_ids % SAMPLE < 2:
            endless.rest()
            most |= sizes_of(*roots)
    gc.collect()
    most["objects of the process"] = len(gc.get_objects())
    return most, resident_bytes()


@pytest.mark.parametrize(
    ("policy", "warm_up", "num_ids"),
    [
        ("elora", 2000, 10_000),
        ("elora_paper", 1000, 3000),
        ("gdsf", 1000, 3000),
        ("lru", 1000, 3000),
    ],
)
def test_memory_does_not_grow_with_the_number_of_past_adapter_ids(
    policy: str, warm_up: int, num_ids: int
) -> None:
    endless = Endless(policy)
    before, bytes_before = run(endless, warm_up)
    after, bytes_after = run(endless, num_ids)
    endless.world.check()
    grown = {name: (before[name], n) for name, n in after.items() if n > before[name] + MOST_MORE}
    assert not grown, grown
    assert bytes_after - bytes_before < MOST_MORE_BYTES
    assert len(endless.world.residency.adapter_table) <= 8
    assert before["HostTier._entries"] and before["EvictionOrder._heaps"], "it was looked at"
