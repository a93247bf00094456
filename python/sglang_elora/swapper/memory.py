"""Protocols of a cache as the planner sees it: counts that it reads and commands that it gives."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeVar

from sglang_elora.control import Counters
from sglang_elora.policy import CacheEntry, Policy
from sglang_elora.tree import Adapter, AdapterTable, Eviction


class Copy(Protocol):
    """A copy of an adapter to the device, in progress."""

    num_slots: int
    confirmed: bool
    """Whether every rank has queued it, so that a batch may use it."""
    launches_before: int
    """Batches launched before the copy was started."""


class QueuedRequest(Protocol):
    """A request in the scheduler's queue, with SGLang's attribute names."""

    @property
    def lora_id(self) -> str | None:
        """Its adapter; None for the base model."""

    @property
    def origin_input_ids(self) -> Sized:
        """The tokens of its prompt."""


class Node(Protocol):
    """A node of the cache tree."""

    entry: CacheEntry


N = TypeVar("N", bound=Node)


class AdapterNode(Protocol):
    """An adapter in the cache tree."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def is_locked(self) -> bool:
        """Whether a request or a copy holds the adapter, or it is pinned."""


class Memory(Protocol[N]):
    """A cache over device, host memory and files.

    Nodes are identified by keys, which remain usable after a node has left the tree.
    """

    adapter_table: AdapterTable
    policy: Policy
    pool_slots: int
    counts: Counters

    @property
    def num_launches(self) -> int:
        """Batches launched so far."""

    @property
    def copies(self) -> Mapping[str, Copy]:
        """Copies in progress by adapter, in the order they were started."""

    @property
    def reading(self) -> Collection[str]:
        """Adapters whose files are being read."""

    @property
    def evicted(self) -> deque[Hashable]:
        """Keys of evicted nodes with a copy in host memory, the most valuable last."""

    @property
    def is_loading_kv(self) -> bool:
        """Whether a load of KV to the device is in progress."""

    @property
    def may_copy_to_host(self) -> bool:
        """Whether evicted KV is copied to the host, and no such copy is in progress."""

    def free_slots(self) -> int: ...

    def evictable_slots(self) -> int: ...

    def node_of(self, adapter_id: str) -> AdapterNode:
        """The adapter's node."""

    def is_usable(self, adapter_id: str) -> bool:
        """Whether the adapter is on the device and its copy, if in progress, cannot fail any
        more."""

    def is_on_host(self, adapter_id: str) -> bool:
        """Whether the adapter's weights are in host memory."""

    def find(self, key: Any) -> N | None:
        """The node of this key; None if it is no longer in the tree."""

    def session_end(self, session: str) -> Hashable | None:
        """Key of the node at which the session's last turn ended; None if it is not open."""

    def is_loadable(self, node: N) -> bool:
        """Whether KV can be loaded: it is only on the host, and its adapter is usable."""

    def is_on_device(self, node: N) -> bool: ...

    def unqueue(self, adapter_id: str) -> None:
        """Record that no queued request needs the adapter any more: it may be evicted, and its
        read cancelled."""

    def evict(self, eviction: Eviction) -> int:
        """Evict, copying KV to the host where that is worth it. Returns the number of leaves."""

    def evict_without_copies(self, eviction: Eviction) -> int:
        """As ``evict``, up to the first leaf that would have to be copied to the host."""

    def start_copy(self, adapter_id: str) -> bool:
        """Copy an adapter from host memory into free slots; False if there are too few."""

    def read(self, adapter_id: str) -> None:
        """Read an adapter's file into host memory, if there is room for it."""

    def read_first(self, adapter_id: str) -> None:
        """Have ``read_ahead`` read this adapter's file next."""

    def read_ahead(self) -> None:
        """Read one file that was never read, if host memory has room for it."""

    def load_kv(self, node: N, eviction: Eviction | None) -> Sequence[CacheEntry]:
        """Load KV of the path that ends at ``node``, evicting for it; without an eviction, only
        into free slots. Returns the entries whose load began."""

    def copy_ahead(self, most_leaves: int) -> bool:
        """Copy the next victims to the host. Returns whether there was one."""
