"""The tree of KV and adapters over SGLang's own host tier: pools, copies, tree, without a model.

Each slot holds what stands for the KV of one prefix under one adapter, so that a match of another
prefix's KV is seen, wherever its KV has been meanwhile.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sglang_elora.tree import namespace_of
from tests.harness.adapter_cache import AdapterCache

pytestmark = pytest.mark.filterwarnings("ignore")  # those of what SGLang imports

NUM_SLOTS, HOST_SLOTS = 300, 450
WEIGHTS = {
    "chat": 50,
    "lock": 3,
    "unlock": 8,
    "evict": 16,
    "evict adapter": 10,
    "events": 16,
    "add": 5,
    "unload": 4,
    "reset": 0.3,
}
WRITE_POLICIES = ("write_back", "write_through", "write_through_selective")


@pytest.fixture(autouse=True)
def plain_host_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``platforms.cpu`` does for a server, for one test."""
    from sglang.srt import runtime_context
    from sglang.srt.mem_cache.pool_host import common, mha

    from sglang_elora.platforms.host_memory import transfer_kv_direct

    monkeypatch.setitem(
        common.ALLOC_MEMORY_FUNCS, "cpu", lambda dims, dtype, **_: torch.empty(dims, dtype=dtype)
    )
    monkeypatch.setattr(mha, "transfer_kv_direct", transfer_kv_direct, raising=False)
    for name in ("_config_bags", "_server_args"):
        monkeypatch.setattr(runtime_context._CONTEXT, name, None)


class HostTierCache(AdapterCache):
    """A cache whose KV goes to host memory too, copied by SGLang."""

    def __init__(self, write_policy: str, *, with_policy: bool) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import ServerArgs

        from sglang_elora.policy import Elora
        from sglang_elora.srt.measured_costs import MeasuredCosts

        options = {"hicache_io_backend": "direct", "hicache_mem_layout": "layer_first"}
        args = ServerArgs(
            model_path="none",
            device="cpu",
            enable_hierarchical_cache=True,
            hicache_ratio=HOST_SLOTS / NUM_SLOTS,
            hicache_write_policy=write_policy,
            **options,
        )
        publish(args, role="scheduler")
        self.pool = MHATokenToKVPool(
            NUM_SLOTS, 1, torch.float32, 1, 1, 1, "cpu", False, enable_alt_stream=False
        )
        super().__init__(NUM_SLOTS, kv_pool=self.pool)
        self.tree.init_hicache(args, self.params)
        self.host_pool = self.tree.cache_controller.mem_pool_host
        self.num_loaded_back = 0
        if with_policy:
            policy = Elora(MeasuredCosts(self.tree).costs, self.core.is_held)
            self.core.use_policy(policy, NUM_SLOTS)

    def chat(self, tokens: Sequence[int], adapter_id: str | None) -> bool:
        """Act as a request whose prompt hits partly on the device, partly on the host."""
        namespace = None if adapter_id is None else namespace_of(adapter_id)
        found = self.match(tokens, namespace)
        receipt, node = self.lock(found.last_device_node), found.last_device_node
        if found.host_hit_length and self.tree.load_back(found.best_match_node):
            self.tree.ready_to_load_host_cache()
            self.num_loaded_back += found.host_hit_length
        self.make_room(len(tokens))
        slots = self.allocator.alloc(len(tokens))
        if slots is not None:
            self.pool.k_buffer[0][slots] = kv_of(tokens, adapter_id)
            base = self._sglang.base
            self.tree.insert(base.InsertParams(key=self._key(tokens, namespace), value=slots))
        self.unlock(node, receipt)
        return slots is not None

    def check_found(self, tokens: Sequence[int], adapter_id: str | None) -> int:
        """What a match returns is this prefix's KV under this adapter; its length."""
        namespace = None if adapter_id is None else namespace_of(adapter_id)
        found = self.slots(self.match(tokens, namespace), namespace)
        expected = kv_of(tokens, adapter_id)[: len(found)]
        assert torch.equal(self.pool.k_buffer[0][found], expected), f"{adapter_id} got another's KV"
        return len(found)

    def evict_adapter(self, adapter_id: str, most_leaves: int) -> None:
        """As ``/elora/evict_adapter`` does."""
        from sglang.srt.mem_cache.unified_cache import unified_tree_core_interface as interface

        from sglang_elora.srt.mem_cache import branches
        from sglang_elora.srt.mem_cache.freed import parts_of

        freed = interface.BaseEvictionResult()
        for _ in range(100):
            if branches.evict(self.core, adapter_id, most_leaves, parts_of(freed)):
                break
        self.tree._apply_eviction_result(freed)

    @property
    def is_settled(self) -> bool:
        """Copies from the host are not yet counted as copies where the policy is write-through."""
        return not self.tree.ongoing_load_back or self.tree.is_write_back

    def check(self, used: Sequence[int] = ()) -> None:
        super().check(used)
        nodes = [n for n in self.core._node_arena.values() if n is not self.core.root_node]
        host = [n.component_data[0].host_value for n in nodes]
        in_tree = sum(len(value) for value in host if value is not None)
        assert self.host_pool.available_size() + in_tree == self.host_pool.size
        for node in nodes:
            assert node in node.parent.children.values(), f"{node.id} cannot be reached"


def kv_of(tokens: Sequence[int], adapter_id: str | None) -> torch.Tensor:
    """What stands for the KV of each token after those before it: float32 ``[tokens, 1, 1]``."""
    values = [hash((adapter_id, tuple(tokens[: i + 1]))) % 2**24 for i in range(len(tokens))]
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


@pytest.mark.parametrize("policy", WRITE_POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_host_tier_keeps_kv_bytes_exact_over_random_histories(seed: int, policy: str) -> None:
    """Adapters are loaded, unloaded and evicted while their KV is on device, host, or both."""
    rng = random.Random(seed)
    cache = HostTierCache(policy, with_policy=seed % 2 == 1)
    locks: list[tuple[Any, Any]] = []
    names: list[str] = []
    paths: list[tuple[tuple[int, ...], str | None]] = [((1,), None)]
    seen: Counter[str] = Counter()
    for step in range(500):
        kind = rng.choices(
            [
                "chat",
                "lock",
                "unlock",
                "evict",
                "evict adapter",
                "events",
                "add",
                "unload",
                "reset",
            ],
            weights=[50, 3, 8, 16, 10, 16, 5, 4, 0.3],
        )[0]
        tokens, adapter_id = rng.choice(paths[-30:])
        if adapter_id is not None and adapter_id not in names:
            continue
        if kind == "add":
            names.append(f"a{step}")
            cache.add(names[-1], rng.randint(1, 40))
            paths.append(((), names[-1]))
        elif kind == "chat":
            tokens += tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 30)))
            if (adapter_id is None or cache.load(adapter_id)) and cache.chat(tokens, adapter_id):
                paths.append((tokens, adapter_id))
        elif kind == "lock" and (adapter_id is None or cache.load(adapter_id)):
            node = cache.match(
                tokens, None if adapter_id is None else namespace_of(adapter_id)
            ).last_device_node
            locks.append((node, cache.lock(node)))
        elif kind == "unlock" and locks:
            cache.unlock(*locks.pop(rng.randrange(len(locks))))
        elif kind == "evict":
            cache.evict(rng.choice([1, 10, 100]))
        elif kind == "evict adapter" and adapter_id is not None:
            cache.evict_adapter(adapter_id, rng.randint(1, 4))
        elif kind == "events":
            cache.tree.check_hicache_events()
        elif kind == "unload" and adapter_id is not None:
            names.remove(adapter_id)
            cache.adapter_table.retire(adapter_id)
        elif kind == "reset" and not locks:
            cache.tree.reset()
            cache.allocator.clear()
        for adapter in cache.adapter_table.retired:
            if rng.random() < 0.3:
                cache.purge_some(str(adapter.adapter_id), rng.randint(1, 3))
        cache.check()
        seen["found"] += (
            cache.check_found(tokens, adapter_id)
            if adapter_id is None or adapter_id in names
            else 0
        )
        seen[kind] += 1
    cache.tree.check_hicache_events()
    for lock in locks:
        cache.unlock(*lock)
    for adapter in cache.adapter_table.retired:
        assert cache.purge(str(adapter.adapter_id)), "what nothing holds is not removed"
    cache.check()
    assert seen["found"] > 1000 and cache.num_loaded_back > 100, seen
