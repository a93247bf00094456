"""The tree of KV and adapters without a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang_elora.tree import Adapter, namespace_of
from tests.harness.radix_cache import Cache


class AdapterCache(Cache):
    """A cache and the adapters in its pool, loaded and unloaded as the server does it."""

    def __init__(
        self, num_slots: int = 400, policy: str = "lru", kv_pool: Any = None, page_size: int = 1
    ) -> None:
        super().__init__("elora", num_slots, policy, kv_pool, page_size=page_size)
        self.core = self.tree.tree_core
        self.adapter_table = self.core.adapter_table
        self.left: list[str] = []
        self.core.on_evicted = self.left.append

    def add(self, adapter_id: str, num_slots: int, *, pinned: bool = False) -> Adapter:
        return self.adapter_table.register(
            adapter_id, num_slots=num_slots, pinned=pinned, version="1"
        )

    def load(self, adapter_id: str) -> bool:
        adapter = self.adapter_table.get(adapter_id)
        if adapter.resident:
            return True
        self.make_room(adapter.num_slots)
        slots = self.allocator.alloc(adapter.num_slots)
        if slots is None:
            return False
        self.core.place(adapter_id, slots)
        return True

    def make_room(self, num_slots: int) -> None:
        if (shortfall := num_slots - self.allocator.available_size()) > 0:
            self.evict(shortfall)

    def chat(self, tokens: Sequence[int], adapter_id: str | None) -> bool:
        """Cache KV as a request with this adapter does: path locked, room made, inserted."""
        namespace = None if adapter_id is None else namespace_of(adapter_id)
        node = self.match(tokens, namespace).last_device_node
        receipt = self.lock(node)
        self.make_room(len(tokens))
        cached = self.insert(tokens, namespace)
        self.unlock(node, receipt)
        return cached

    def unload(self, adapter_id: str) -> None:
        if adapter_id in self.adapter_table:
            self.adapter_table.retire(adapter_id)
            self.purge(adapter_id)

    def purge(self, adapter_id: str, most_looks: int = 1_000) -> bool:
        """Return whether nothing is left."""
        return self.purge_some(adapter_id, most_looks).is_over

    def purge_some(self, adapter_id: str, most_looks: int) -> Any:
        from sglang_elora.srt.mem_cache import branches

        done = branches.purge(self.core, adapter_id, most_looks)
        self.tree._apply_eviction_result(done.freed)
        return done

    @property
    def is_settled(self) -> bool:
        """Whether SGLang's own check holds, which is made for an idle server."""
        return True

    def check(self, used: Sequence[int] = ()) -> None:
        """Own invariants, SGLang's, and that slots are free or in the tree, never both."""
        if self.is_settled:
            self.tree.sanity_check()
        self.core.check_invariants()
        owners = Counter(self.free_slots() + self.core.all_values_flatten().tolist() + list(used))
        first = self.allocator.page_size  # the page before is for padding
        assert owners == Counter(range(first, first + self.allocator.size))
        budget = self.tree.evictable_size() + self.core.protected_size()
        assert self.allocator.available_size() + budget == self.allocator.size
