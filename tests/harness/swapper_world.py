"""The server's pool, tree, policy, host tier and swapper without a model and without a server."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch

from sglang_elora.pages import AdapterImage, AdapterLayout, HostArena, ModuleShape, lazy_memory
from sglang_elora.policy import PolicyContext, make_policy
from sglang_elora.swapper.host_tier import HostTier
from sglang_elora.swapper.planner import LOOKAHEAD, ROOM_LEAVES, WORK_PER_STEP
from sglang_elora.tree import namespace_of
from tests.harness.radix_cache import Cache, sglang

sglang()
with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang_elora.srt.measured_costs import MeasuredCosts
    from sglang_elora.srt.mem_cache.residency import (
        PURGE_NODES,
        AdapterSource,
        PoolTooSmall,
        Residency,
    )
    from sglang_elora.srt.scheduler.admission import MAX_BYPASS, Admission, preempt
    from sglang_elora.srt.scheduler.swapper import EVICT_LEAVES, Swapper

__all__ = [
    "EVICT_LEAVES",
    "HEAD_DIM",
    "LOOKAHEAD",
    "MAX_BYPASS",
    "PURGE_NODES",
    "ROOM_LEAVES",
    "WORK_PER_STEP",
    "AdapterSource",
    "Admission",
    "HostTier",
    "PoolTooSmall",
    "Residency",
    "SwapperWorld",
    "adapter_id",
    "preempt",
]

HEAD_DIM = 16
_RANK = 8
_BLOCK_BYTES = 4096


class SwapperWorld:
    """One scheduler's cache, and requests that are no more than an adapter and a length.

    Args:
        num_slots: Of the pool, which has one head: enough for copies of pages.
        adapter_slots: That each adapter takes, a multiple of 32.
        kv_dtype: Of the KV pool; a slot has the same bytes in each. Weights are float32.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        num_adapters: int,
        adapter_slots: int,
        policy: str = "lru",
        host_bytes: int = 10**9,
        num_layers: int = 1,
        page_size: int = 1,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_slots + page_size, 1, HEAD_DIM * torch.float32.itemsize // kv_dtype.itemsize)
        k, v = ([torch.zeros(shape, dtype=kv_dtype) for _ in range(num_layers)] for _ in range(2))
        self.pool = SimpleNamespace(k_buffer=k, v_buffer=v, dtype=kv_dtype)
        self.cache = Cache("elora", num_slots, kv_pool=self.pool, page_size=page_size)
        self.core: Any = self.cache.tree.tree_core
        self.measured = MeasuredCosts(self.cache.tree)
        context = PolicyContext(
            self.measured.costs,
            needed_adapters=lambda: 8.0,
            resident_adapters=lambda: self.core.adapter_table.num_resident,
            is_held=self.core.is_held,
        )
        self.core.use_policy(make_policy(policy, context), num_slots)
        arena = HostArena(lazy_memory(host_bytes), _BLOCK_BYTES)
        adapter_table = self.core.adapter_table
        self.host = HostTier(
            arena, self.core.image_priority, adapter_table.image_position, adapter_table.touch
        )
        self.forward_stream = torch.cpu.Stream()
        self.residency = Residency(self.cache.tree, torch.float32, self.host, self.forward_stream)
        self.swapper = Swapper(self.residency, self.measured)
        self.waiting: list[Any] = []
        self.scheduler: Any = SimpleNamespace(waiting_queue=self.waiting, chunked_req=None)
        self._image = _image(adapter_slots, num_layers)
        for i in range(num_adapters):
            self.load(adapter_id(i))

    def load(self, name: str) -> None:
        """Make an adapter servable, as ``/load_lora_adapter`` does."""
        image = self._image
        source = AdapterSource(name, name, image.layout, image.nbytes, False, image=image)
        self.residency.register(source)

    def step(self, *, is_busy: bool = True) -> None:
        """Do the work before a batch; ``Swapper.prepare`` does the work after its launch."""
        self.swapper.step(self.scheduler, is_busy=is_busy)

    def arrive(self, name: str, prompt_tokens: int = 1) -> Any:
        req = SimpleNamespace(lora_id=name, origin_input_ids=range(prompt_tokens))
        self.waiting.append(req)
        return req

    def is_resident(self, name: str) -> bool:
        return self.residency.adapter_table.get(name).resident

    def cache_kv(self, name: str, tokens: list[int]) -> None:
        """Cache KV as a request with this resident adapter does: lock, evict for room, insert."""
        namespace = namespace_of(name)
        node = self.core.node_of(name)
        receipt = self.cache.lock(node.id)
        if (shortfall := len(tokens) - self.cache.allocator.available_size()) > 0:
            self.cache.evict(shortfall)
        assert self.cache.insert(tokens, namespace)
        self.core.visit(self.cache.match(tokens, namespace).last_device_node)
        self.cache.unlock(node.id, receipt)

    def check(self) -> None:
        self.cache.tree.sanity_check()
        self.core.check_invariants()
        self.host.check_invariants()


def adapter_id(i: int) -> str:
    return f"{i:08}"


def _image(num_slots: int, num_layers: int) -> AdapterImage:
    width = num_slots * HEAD_DIM // _RANK
    layout = AdapterLayout.build(_RANK, [ModuleShape("o_proj", width, (width,))])
    assert layout.num_slots(HEAD_DIM, 1) == num_slots, layout
    a, b = torch.ones(_RANK, width), torch.ones(width, _RANK)
    return AdapterImage.build(layout, num_layers, lambda *_: (a, b), torch.float32, 1.0)
