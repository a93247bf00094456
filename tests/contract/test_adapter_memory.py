"""The host memory that is reserved for adapters at the start: on a CPU, and as CUDA locks it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import HostMemoryFull, ModuleShape
from tests.harness.swapper_world import SwapperWorld, adapter_id

RANK_BYTES = 100_000
SLOTS = 64


class Cudart:
    """CUDA's calls that lock memory, as far as a machine without a device can make them."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}  # address -> bytes

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.code:
            self.locked[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


@pytest.fixture(scope="module")
def memory() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.lora import adapter_memory
    return adapter_memory


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudart]:
    made = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    yield made


@pytest.fixture
def manager() -> Any:
    """What is asked of a LoRA manager: its model's shapes."""
    elems = RANK_BYTES // 2 // 4 // 2  # a layer's A or B of rank 1, float32
    shape = ModuleShape("o_proj", elems // 64 * 64, (elems // 64 * 64,))
    pool = SimpleNamespace(plan=SimpleNamespace(num_layers=2, shapes=(shape,)))
    return SimpleNamespace(memory_pool=pool, dtype=torch.float32)


def test_host_arena_on_cuda_page_locks_one_allocation_within_the_budget(
    memory: Any, cudart: Cudart, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory_budget_bytes", lambda requested: 10**9)
    arena = memory.arena_for(manager, 10_000_000, "cuda:0")
    assert arena.block_bytes == 32_768  # half of a rank, as a power of two
    (locked,) = cudart.locked.values()
    assert locked == arena.num_blocks * arena.block_bytes
    assert 10_000_000 - arena.block_bytes < locked <= 10_000_000
    blocks = arena.take(locked)
    assert [chunk.data_ptr() for chunk in blocks.chunks] == list(cudart.locked)


def test_zero_host_budget_page_locks_nothing(memory: Any, cudart: Cudart, manager: Any) -> None:
    assert memory.page_locked_memory(0).nbytes == 0
    assert memory.arena_for(manager, 0, "cpu").num_blocks == 0
    assert not cudart.locked


def test_host_arena_on_cpu_page_locks_nothing(memory: Any, cudart: Cudart, manager: Any) -> None:
    arena = memory.arena_for(manager, 16 * 10**9, "cpu")
    assert 16 * 10**9 - arena.block_bytes < arena.num_blocks * arena.block_bytes
    assert not cudart.locked


def test_host_budget_above_machine_memory_fails_launch_naming_the_flag(
    memory: Any, cudart: Cudart, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory_budget_bytes", lambda requested: 3 * 10**9)
    with pytest.raises(HostMemoryFull, match=r"--elora-host-gb asks for 16\.00 GB .* 3\.00 GB"):
        memory.arena_for(manager, 16 * 10**9, "cuda")
    assert not cudart.locked


def test_failed_page_locking_fails_launch_naming_the_flag(memory: Any, cudart: Cudart) -> None:
    cudart.code = 2
    with pytest.raises(HostMemoryFull, match=r"of --elora-host-gb cannot be page-locked \(.*rc=2"):
        memory.page_locked_memory(2**20)


def test_image_position_is_finite_for_queued_nonresident_adapters_only() -> None:
    made = SwapperWorld(4 * SLOTS, num_adapters=3, adapter_slots=SLOTS)
    position = made.core.adapter_table.image_position
    assert position(adapter_id(1)) == math.inf
    made.core.orders.set_queue_position(made.core.node_of(adapter_id(1)), 7)
    assert position(adapter_id(1)) == 7
    made.arrive(adapter_id(1))
    made.step()
    assert made.is_resident(adapter_id(1)) and position(adapter_id(1)) == math.inf
    made.check()
