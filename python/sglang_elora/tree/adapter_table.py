"""The table of adapters (layer 2 of the cache tree): state and counters of each."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from sglang_elora.policy import CacheEntry
from sglang_elora.tree.activation import ACTIVATED

_LORA, _BASE = "lora/", "base/"


def adapter_of(namespace: str | None) -> str | None:
    """The adapter id in a request's cache namespace; None is the base model.

    Namespaces are ``lora/<extra key>/<adapter id>``, ``base/<extra key>/`` or None (patch 01), or
    those of ``ActivatedNamespace``. An adapter id contains no slash. SGLang creates a new one for
    every load, so it identifies the adapter and the version of its content.
    """
    if namespace is None or not namespace.startswith((_LORA, ACTIVATED)):
        return None
    return namespace.rpartition("/")[2]


def namespace_of(adapter_id: str, extra_key: str = "") -> str:
    """Inverse of ``adapter_of``."""
    return f"{_LORA}{extra_key}/{adapter_id}"


def base_namespace(extra_key: str | None) -> str | None:
    """The cache namespace of requests of the base model with this extra key."""
    return f"{_BASE}{extra_key}/" if extra_key else None


@dataclass(slots=True, eq=False)
class Adapter:
    """State of one adapter, or of the base model, which has no slots and is always resident.

    ``device_tokens`` and ``host_tokens`` count the KV below it in each tier; the tree updates them.
    ``resident`` is True while its weights have slots.
    """

    adapter_id: str | None
    num_slots: int = 0
    pinned: bool = False
    version: str = ""  # digest of the weights
    num_dropped: int = 0  # stored weights that are not served
    invocation: tuple[int, ...] = ()  # tokens of an activated LoRA (``tree.activation``)
    retired: bool = False  # unloaded; its slots and KV are freed once no request holds them
    resident: bool = False
    device_tokens: int = 0
    host_tokens: int = 0
    evicted_s: float = -math.inf  # time of the last eviction (monotonic), to count churn
    num_requests: int = 0  # requests that ran with it
    computed_tokens: int = 0  # tokens of their prompts that were not found in the cache
    generated_tokens: int = 0  # tokens of the answers that have ended
    shared_tokens: int = 0  # tokens of their prompts that were found as KV of the base model
    used_s: float | None = None  # when the last of them began (monotonic clock)
    entry: CacheEntry = field(init=False)  # state for the eviction policy

    def __post_init__(self) -> None:
        self.entry = CacheEntry(True, self.num_slots, self.adapter_id, backed=True)

    @property
    def invalid_tokens(self) -> int:
        """KV tokens on the device without their adapter: 0 by the dependency rule."""
        return 0 if self.resident else self.device_tokens


@dataclass(slots=True)
class AdapterTable:
    """All adapters by id. A reset of the tree keeps the adapters, but not their KV.

    ``pinned_slots`` are the slots of pinned adapters, loaded or not; tokens are those of all
    adapters and of the base model. All sums are updated incrementally, so reading one is O(1).

    ``on_removed`` is called once with the id of each removed adapter; no request and no KV refers
    to the id afterwards.
    """

    base: Adapter = field(default_factory=lambda: Adapter(adapter_id=None, resident=True))
    pinned_slots: int = 0
    num_resident: int = 0
    resident_slots: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    invalid_tokens: int = 0  # KV on the device without its adapter: 0 by the dependency rule
    num_changes: int = 0  # changes of adapters so far
    on_removed: Callable[[str], None] = lambda adapter_id: None
    _adapters: dict[str, Adapter] = field(default_factory=dict)
    _retired: OrderedDict[str, Adapter] = field(default_factory=OrderedDict)
    _unpinned: Counter[int] = field(default_factory=Counter)  # slots -> unpinned adapters
    _changed_at: dict[str, int] = field(default_factory=dict)  # last change, oldest first

    def __iter__(self) -> Iterator[Adapter]:
        """All adapters except the base model, in order of registration."""
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._adapters

    def register(self, adapter_id: str, *, num_slots: int, pinned: bool, version: str) -> Adapter:
        """Add an adapter. Its id must be new."""
        assert adapter_id not in self._adapters, f"adapter {adapter_id} is registered"
        adapter = Adapter(adapter_id, num_slots=num_slots, pinned=pinned, version=version)
        self._adapters[adapter_id] = adapter
        self.pinned_slots += num_slots * pinned
        if not pinned:
            self._count_unpinned(num_slots, 1)
        self.touch(adapter_id)
        return adapter

    def count_kv(self, adapter: Adapter, *, device: int, host: int) -> None:
        """Add to the adapter's KV tokens in each tier; negative numbers for tokens that left."""
        self.invalid_tokens -= adapter.invalid_tokens
        adapter.device_tokens += device
        adapter.host_tokens += host
        self.invalid_tokens += adapter.invalid_tokens
        self.device_tokens += device
        self.host_tokens += host
        if adapter.adapter_id is not None:
            self.touch(adapter.adapter_id)

    def set_resident(self, adapter: Adapter, resident: bool) -> None:
        """Record that the adapter was loaded to the device or evicted from it."""
        assert adapter.adapter_id is not None and adapter.resident != resident, adapter
        self.invalid_tokens -= adapter.invalid_tokens
        adapter.resident = resident
        self.invalid_tokens += adapter.invalid_tokens
        sign = 1 if resident else -1
        self.num_resident += sign
        self.resident_slots += sign * adapter.num_slots
        self.touch(adapter.adapter_id)

    def used(self, adapter_id: str, moment_s: float) -> None:
        """Record that a request with the adapter started to run at ``moment_s`` (monotonic)."""
        adapter = self._adapters[adapter_id]
        adapter.num_requests += 1
        adapter.used_s = moment_s
        self.touch(adapter_id)

    def answered(self, adapter_id: str | None, num_tokens: int) -> None:
        """Record that an answer has ended, with ``num_tokens`` generated."""
        self.get(adapter_id).generated_tokens += num_tokens
        if adapter_id is not None:
            self.touch(adapter_id)

    def touch(self, adapter_id: str) -> None:
        """Record that the adapter's state has changed, for ``changed_since``."""
        self.num_changes += 1
        self._changed_at.pop(adapter_id, None)
        self._changed_at[adapter_id] = self.num_changes

    def changed_since(self, num_changes: int) -> list[tuple[str, int]]:
        """Adapters changed after change number ``num_changes``, each with the number of its last
        change; O(their number)."""
        newest_first = reversed(self._changed_at.items())
        return list(takewhile(lambda changed: changed[1] > num_changes, newest_first))[::-1]

    def get(self, adapter_id: str | None) -> Adapter:
        """The adapter of this id.

        An unknown id is that of an adapter unloaded while a request still ran: it is added again,
        already retired, to own the KV which that request leaves.
        """
        if adapter_id is None:
            return self.base
        adapter = self._adapters.get(adapter_id)
        if adapter is None:
            adapter = self._adapters[adapter_id] = Adapter(adapter_id)
            self._count_unpinned(0, 1)
            self.retire(adapter_id)
        return adapter

    def image_position(self, adapter_id: str) -> float:
        """Queue position of the first request that needs the adapter's copy in host memory.
        Infinity if none does, or its weights are on the device."""
        adapter = self.get(adapter_id)
        position = adapter.entry.queue_position
        return math.inf if position is None or adapter.resident else position

    def retire(self, adapter_id: str) -> None:
        """Mark the adapter as retired: no new request will use it."""
        adapter = self._adapters[adapter_id]
        adapter.retired = True
        self._retired[adapter_id] = adapter

    @property
    def retired(self) -> tuple[Adapter, ...]:
        """Retired adapters that are not removed yet."""
        return tuple(self._retired.values())

    @property
    def num_retired(self) -> int:
        return len(self._retired)

    def next_retired(self) -> Adapter | None:
        """The next retired adapter, round robin; None if there is none. O(1)."""
        if not self._retired:
            return None
        adapter_id = next(iter(self._retired))
        self._retired.move_to_end(adapter_id)
        return self._retired[adapter_id]

    def pin(self, adapter: Adapter) -> None:
        """Mark the adapter as pinned; no effect if it is."""
        if not adapter.pinned:
            self.pinned_slots += adapter.num_slots
            self._count_unpinned(adapter.num_slots, -1)
        adapter.pinned = True
        self.touch(str(adapter.adapter_id))

    def unpin(self, adapter: Adapter) -> None:
        """Mark the adapter as not pinned; no effect if it is not."""
        if adapter.pinned:
            self.pinned_slots -= adapter.num_slots
            self._count_unpinned(adapter.num_slots, 1)
        adapter.pinned = False
        self.touch(str(adapter.adapter_id))

    def remove(self, adapter_id: str) -> None:
        """Remove a retired adapter that has neither slots nor KV."""
        adapter = self._retired.pop(adapter_id)
        self.unpin(adapter)
        self._count_unpinned(adapter.num_slots, -1)
        del self._adapters[adapter_id]
        del self._changed_at[adapter_id]
        assert not (adapter.resident or adapter.device_tokens or adapter.host_tokens), adapter
        self.on_removed(adapter_id)

    def clear_tree(self) -> None:
        """Record a reset of the tree: all KV and all adapters' slots are freed."""
        self.count_kv(self.base, device=-self.base.device_tokens, host=-self.base.host_tokens)
        for adapter in self:
            if adapter.resident:
                self.set_resident(adapter, False)
            self.count_kv(adapter, device=-adapter.device_tokens, host=-adapter.host_tokens)
        for adapter in self.retired:
            self.remove(str(adapter.adapter_id))

    def largest_unpinned(self, without: str | None = None) -> int:
        """Slots of the largest unpinned adapter other than ``without``; 0 if there is none.
        O(distinct sizes of adapters)."""
        own = None if without is None else self._adapters[without]
        left_out = {} if own is None or own.pinned else {own.num_slots: 1}
        others = (n for n, count in self._unpinned.items() if count > left_out.get(n, 0))
        return max(others, default=0)

    def _count_unpinned(self, num_slots: int, change: int) -> None:
        self._unpinned[num_slots] += change
        if not self._unpinned[num_slots]:
            del self._unpinned[num_slots]

    def check_invariants(self) -> None:
        """Raises:
        AssertionError: A sum differs from that over the adapters.
        """
        everybody = [self.base, *self]
        sums = {
            "pinned_slots": sum(a.num_slots for a in self if a.pinned),
            "num_resident": sum(a.resident for a in self),
            "resident_slots": sum(a.num_slots for a in self if a.resident),
            "device_tokens": sum(a.device_tokens for a in everybody),
            "host_tokens": sum(a.host_tokens for a in everybody),
            "invalid_tokens": sum(a.invalid_tokens for a in everybody),
            "_unpinned": Counter(a.num_slots for a in self if not a.pinned),
        }
        counted = {name: getattr(self, name) for name in sums}
        assert counted == sums, (counted, sums)
