"""What moves between file, host memory and device, and when: the decisions, without the doing.

The planner sees a cache through ``Memory`` (``memory.py``), a protocol of counts and commands. The
server implements it on SGLang's tree and pools (``srt/scheduler/memory.py``), the simulator on
numbers (``sim/memory.py``); so both take the same decisions. Nothing here imports sglang or torch,
reads a clock or waits.

Per scheduler iteration the owner calls ``begin_step``, ``load`` (before a batch is chosen) and
``prepare`` (while the batch runs, or when there is none).

All ranks of a tensor-parallel group decide alike: everything here rests on the queue, the tree and
what the ranks have agreed on about reads and copies.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from typing import Generic

from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import CacheEntry
from sglang_elora.swapper.memory import Memory, N, QueuedRequest
from sglang_elora.swapper.pending_hints import ORDER_STEPS, PendingHints
from sglang_elora.tree import Adapter, Eviction

LOOKAHEAD = 64
"""Queued requests whose adapters are loaded before it is their turn."""

MAX_SLOTS_UNDER_WAY_SHARE = 0.25
"""Share of the pool that copies under way may take. Their slots cannot be evicted meanwhile."""

PREFETCH_BELOW = 0.7
"""Share of the pool in use below which evicted entries are loaded back."""

PREFETCH_LOOKS = 8
"""Most evicted entries that a step looks at to find one to load back."""

WORK_PER_STEP = 3
"""Work that a step may do while batches run, in evictions of leaves; starting a copy counts as
``COPY_WORK``. The rest is done in later steps. Without a batch to delay, there is no limit."""

COPY_WORK = 1
"""Work of starting a copy, which takes a scheduler as long as evicting so many leaves."""

ROOM_LEAVES = 2
"""Most leaves that are evicted per batch to have room for the next load."""

EXPECTED_WITHIN = 1.0
"""Another load is assumed to follow within this many pool turnovers of the last one."""

LAST_LOADS = 8
"""Room is kept for the largest of the last loads."""

COPY_AHEAD_BELOW = 0.1
"""Share of the pool that is free below which the next victims are copied to the host early."""

COPY_AHEAD_LEAVES = 4
"""Next victims that are looked at, and copied together."""

MAX_SESSIONS = 64
"""Most sessions whose KV is to be loaded before their next request arrives."""

SESSION_LEAVES = 8
"""Most leaves that are evicted for the KV of one of them."""


class Planner(Generic[N]):
    """One per scheduler.

    Args:
        memory: The cache.
        costs: Measured rates.
    """

    def __init__(self, memory: Memory[N], costs: OnlineCosts) -> None:
        self._memory, self._online = memory, costs
        self._costs = costs.costs
        self.pending = PendingHints(memory.pool_slots)
        self._queued: dict[str, int] = {}  # adapter -> position of the first request for it
        self._sessions: dict[Hashable, int] = {}  # end of a session -> step up to which
        self._num_busy_steps = 0
        self._work_left = sys.maxsize
        self._put_off: str | None = None  # adapter whose copy was due in the step before
        self._last_loads: deque[int] = deque(maxlen=LAST_LOADS)  # their slots
        self._loaded_at = -math.inf  # the last one, by the policy's clock
        self._all_copied_at = -1.0  # by the policy's clock: nothing was left to copy ahead

    # ==== Once per scheduler iteration ====

    def begin_step(self, *, is_busy: bool) -> None:
        """An iteration begins. ``is_busy``: batches run, which long steps would delay."""
        self._work_left = WORK_PER_STEP if is_busy else sys.maxsize
        self._num_busy_steps += is_busy
        if is_busy:
            self.pending.step()

    def load(self, queue: Sequence[QueuedRequest], reserved: int = 0) -> None:
        """Start loads for the first queued requests, in their order, then for what is expected.
        With nothing queued, expected or under way, load back one evicted entry into free slots.

        Args:
            queue: All queued requests.
            reserved: Slots that a prompt under way takes next; it is computed chunk by chunk.
        """
        had_copies = bool(self._memory.copies)
        if queue or self._queued or self.pending:
            self._load_queued(queue, reserved)
        elif self._memory.evicted and not had_copies and not reserved:
            self._load_back()

    def load_session(self) -> None:
        """Load the KV of the first announced session whose adapter is there; one at a time."""
        memory = self._memory
        if not self._sessions or memory.is_loading_kv:
            return
        for key, last_step in [*self._sessions.items()]:
            end = memory.find(key)
            if end is None or memory.is_on_device(end) or last_step < self._num_busy_steps:
                del self._sessions[key]
                continue
            if end.entry.group is not None and not memory.is_usable(end.entry.group):
                continue
            del self._sessions[key]
            eviction = Eviction(protect_up_to=LOOKAHEAD, max_leaves=SESSION_LEAVES)
            self._note_prefetched(memory.load_kv(end, eviction))
            return

    def read_ahead(self, queue: Sequence[QueuedRequest], *, is_busy: bool) -> None:
        """With nothing to do, read one file that never was read."""
        if not (queue or is_busy or self._memory.reading):
            self._memory.read_ahead()

    def prepare(self) -> bool:
        """Do one thing that makes later steps shorter. Whether there was one to do."""
        return (
            self._online.refresh()
            or self._memory.policy.learn()
            or self._keep_room()
            or self._copy_ahead()
        )

    # ==== Hints and orders ====

    def expect(self, adapter_ids: Iterable[str], *, ordered: bool = False) -> int:
        """Requests with these adapters are about to arrive: load them after the adapters of queued
        requests, evicting nothing that these need.

        Args:
            ordered: This is an order, not a hint: they must be loaded, and stay for a while.

        Returns:
            How many of them are expected now; others are unknown, or there are too many.
        """
        counts, adapter_table, num_taken = self._memory.counts, self._memory.adapter_table, 0
        for adapter_id in adapter_ids:
            is_known = adapter_id in adapter_table and not adapter_table.get(adapter_id).retired
            if not is_known or not self.pending.add(adapter_id, ordered=ordered):
                counts.hints_dropped += 1
                continue
            counts.hints += 1
            counts.hints_late += self.is_queued(adapter_id)
            num_taken += 1
        return num_taken

    def expect_sessions(self, sessions: Iterable[str]) -> int:
        """Requests of these sessions are about to arrive: load their KV from the host once their
        adapter is there, evicting nothing that queued requests need.

        Returns:
            How many of them are alive.
        """
        memory, num_alive = self._memory, 0
        for session in sessions:
            key = memory.session_end(session)
            end = None if key is None else memory.find(key)
            num_alive += end is not None
            if end is None or memory.is_on_device(end) or len(self._sessions) >= MAX_SESSIONS:
                continue
            self._sessions.setdefault(key, self._num_busy_steps + ORDER_STEPS)
        return num_alive

    def used(self, adapter_id: str) -> None:
        """A request with this adapter runs."""
        self._online.popularity.use(adapter_id)
        self._memory.counts.hints_used += self.pending.used(adapter_id)

    def is_queued(self, adapter_id: str) -> bool:
        """Whether one of the first queued requests needs the adapter."""
        return self._queued.get(adapter_id, LOOKAHEAD) < LOOKAHEAD

    @property
    def is_limited(self) -> bool:
        """Whether the last step ended because its work was done, and not because nothing was left:
        the next one should come soon."""
        return self._work_left < COPY_WORK

    # ==== Admission ====

    def is_hidden(
        self, adapter_id: str, num_tokens: int, *, is_idle: bool, replays_graph: bool
    ) -> bool:
        """Whether a batch with this prompt may be started before the adapter's copy is over.

        That delays nothing where nothing else can run. Otherwise the copies must take no longer
        than what runs before the batch needs them: batches launched since the copy was started,
        and, if the batch waits for each layer's weights as it reaches the layer, its own
        computation. A batch that is replayed from a prefill graph waits for the whole copy before
        it begins, so its own computation hides nothing.

        Args:
            num_tokens: Tokens of the prompt.
            is_idle: No other request could run instead.
            replays_graph: The batch is replayed from a prefill graph.
        """
        memory, costs, slots = self._memory, self._costs, 0
        copy = memory.copies[adapter_id]
        if not copy.confirmed:
            return False
        if is_idle:
            return True
        for other in memory.copies.values():
            slots += other.num_slots
            if other is copy:
                break
        copying = slots * costs.load + costs.load_latency
        # The least that a batch takes: each of them reads all of the model's weights.
        hiding = (memory.num_launches - copy.launches_before) * costs.batch
        if not replays_graph:
            hiding += costs.batch + num_tokens * costs.recompute
        return copying <= hiding

    # ==== Loads ====

    def _load_queued(self, queue: Sequence[QueuedRequest], reserved: int) -> None:
        """Start what the first queued requests need, as far as the pool can hold it with them.

        The first of them only has to fit by itself, unless slots are ``reserved``. Expected
        adapters come one after the other, so that a load that a request does need has at most one
        of them ahead of it, and at most one file is read for them at a time.
        """
        queued: dict[str, int] = {}
        missing: list[Adapter] = []
        memory, node_of = self._memory, self._memory.node_of
        room = memory.free_slots() + memory.evictable_slots() - reserved
        for position, request in enumerate(islice(queue, LOOKAHEAD)):
            adapter_id = request.lora_id
            room -= len(request.origin_input_ids)
            if adapter_id is not None and adapter_id not in queued:
                node = node_of(adapter_id)
                adapter = node.adapter
                if not node.is_locked:
                    room -= adapter.num_slots
                if room >= 0 or not (queued or reserved):
                    queued[adapter_id] = position
                    adapter.entry.queue_position = position
                    if not adapter.resident and not adapter.retired:
                        missing.append(adapter)
            if room < 0:
                break
        else:
            self._add_expected(queued, missing, room)
        self._set_queued(queued)
        has_room = True
        for adapter in missing:
            adapter_id = str(adapter.adapter_id)
            is_expected = queued[adapter_id] == LOOKAHEAD
            if is_expected and self._is_moving_another(adapter_id):
                break
            if not memory.is_on_host(adapter_id):
                memory.read(adapter_id)
            elif has_room:  # slots that are freed for one adapter are not taken by a later one
                has_room = self._may_start(adapter) and self._place(adapter, queued[adapter_id])
                if has_room and is_expected:
                    self.pending.came(adapter_id)

    def _add_expected(self, queued: dict[str, int], missing: list[Adapter], room: int) -> None:
        """Expected adapters are queued after all requests, and held to ``room`` as well."""
        hinted_slots, expected, memory = 0, self.pending, self._memory
        for adapter_id in expected.due():
            if adapter_id in queued:
                continue
            if (
                adapter_id not in memory.adapter_table
                or memory.adapter_table.get(adapter_id).retired
            ):
                expected.forget(adapter_id)
                continue
            node = memory.node_of(adapter_id)
            adapter = node.adapter
            num_slots, is_there = adapter.num_slots, adapter.resident
            if not expected.is_followed(adapter_id, num_slots, hinted_slots, is_there=is_there):
                continue
            hinted_slots += num_slots * expected.is_hint(adapter_id)
            if not node.is_locked:
                room -= num_slots
            if room < 0:
                break
            queued[adapter_id] = LOOKAHEAD
            adapter.entry.queue_position = LOOKAHEAD
            if not is_there:
                missing.append(adapter)

    def _set_queued(self, queued: dict[str, int]) -> None:
        for adapter_id in [a for a in self._queued if a not in queued]:  # equal on all ranks
            self._memory.unqueue(adapter_id)
        self._queued = queued

    def _is_moving_another(self, adapter_id: str) -> bool:
        """Whether a copy is under way, or the file of another adapter is being read."""
        memory = self._memory
        return bool(memory.copies) or any(other != adapter_id for other in memory.reading)

    def _may_start(self, adapter: Adapter) -> bool:
        under_way = sum(copy.num_slots for copy in self._memory.copies.values())
        most = MAX_SLOTS_UNDER_WAY_SHARE * self._memory.pool_slots
        return not under_way or under_way + adapter.num_slots <= most

    def _place(self, adapter: Adapter, protect_up_to: int) -> bool:
        """Evict for an adapter and start its copy; its weights are in host memory.

        Returns:
            Whether its copy has begun; if not, a later call goes on with the evictions.
        """
        memory, adapter_id = self._memory, str(adapter.adapter_id)
        shortfall = adapter.num_slots - memory.free_slots()
        if shortfall > 0:
            eviction = Eviction(shortfall, protect_up_to, self._work_left)
            self._work_left -= memory.evict(eviction)
        if self._work_left < COPY_WORK and self._put_off != adapter_id:
            self._put_off = adapter_id  # once: another may take its slots meanwhile
            return False
        self._put_off = None
        if not memory.start_copy(adapter_id):
            return False
        self._work_left -= COPY_WORK
        self._last_loads.append(adapter.num_slots)
        self._loaded_at = memory.policy.clock
        return True

    # ==== With time to spare ====

    def _load_back(self) -> None:
        """Load back one of the last evicted entries, into slots that nothing else needs."""
        memory = self._memory
        room = memory.free_slots() - (1 - PREFETCH_BELOW) * memory.pool_slots
        if room <= 0 or memory.is_loading_kv:
            return
        for _ in range(min(len(memory.evicted), PREFETCH_LOOKS)):
            node = memory.find(memory.evicted.pop())
            if node is None or node.entry.num_slots > room:
                continue
            if node.entry.is_adapter:
                loaded = [node.entry] if self._load_adapter_back(str(node.entry.group)) else []
            else:
                loaded = [*memory.load_kv(node, None)] if memory.is_loadable(node) else []
            if loaded:
                self._note_prefetched(loaded)
                return

    def _load_adapter_back(self, adapter_id: str) -> bool:
        adapter = self._memory.adapter_table.get(adapter_id)
        is_ready = not (adapter.resident or adapter.retired) and self._memory.is_on_host(adapter_id)
        return is_ready and self._place(adapter, LOOKAHEAD)

    def _note_prefetched(self, items: Iterable[CacheEntry]) -> None:
        for item in items:
            item.prefetched = True
            self._memory.counts.prefetched_slots += item.num_slots

    def _keep_room(self) -> bool:
        """Evict a little KV, until a load like the last ones would find its slots free.

        A load that has to evict first takes several steps. While no adapter is loaded, none is
        assumed to follow, and nothing is evicted. KV that has to be copied to the host first
        stays, and so does an adapter, which frees many slots in one step.
        """
        memory = self._memory
        shortfall = max(self._last_loads, default=0) - memory.free_slots()
        if shortfall <= 0 or memory.policy.clock - self._loaded_at > EXPECTED_WITHIN:
            return False
        eviction = Eviction(
            shortfall, sys.maxsize, ROOM_LEAVES, reason="proactive", takes_adapters=False
        )
        return memory.evict_without_copies(eviction) > 0

    def _copy_ahead(self) -> bool:
        """Copy the next victims to the host, so that their eviction need not wait for it."""
        memory = self._memory
        if not memory.may_copy_to_host:
            return False
        if memory.free_slots() > COPY_AHEAD_BELOW * memory.pool_slots:
            return False
        clock = memory.policy.clock
        if clock == self._all_copied_at:
            return False
        has_copied = memory.copy_ahead(COPY_AHEAD_LEAVES)
        if not has_copied:
            self._all_copied_at = clock
        return has_copied
