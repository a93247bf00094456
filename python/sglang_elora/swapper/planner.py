"""The planner decides which adapters and KV move between file, host memory and device, and when.

It accesses a cache through ``Memory`` (``memory.py``), a protocol of counts and commands. The
server implements it on SGLang's tree and pools (``srt/scheduler/memory.py``), the simulator on
numbers (``sim/memory.py``); so both take the same decisions. Nothing here imports sglang or torch,
reads a clock or blocks.

Per scheduler iteration the owner calls ``begin_step``, ``load`` (before a batch is chosen) and
``prepare`` (while the batch runs, or when there is none).

All ranks of a tensor-parallel group take the same decisions, because these depend only on the
queue, the tree and the progress of reads and copies that the ranks have agreed on.
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
"""Queued requests, from the first on, whose adapters are loaded in advance. More protect more
adapters from eviction, and lengthen each step."""

MAX_SLOTS_UNDER_WAY_SHARE = 0.25
"""Share of the pool that copies in progress may take. Their slots cannot be evicted meanwhile."""

PREFETCH_BELOW = 0.7
"""Share of the pool in use below which evicted entries are loaded back. Higher loads back more."""

PREFETCH_LOOKS = 8
"""Most evicted entries that a step checks to find one to load back."""

WORK_PER_STEP = 3
"""Most work of a step while batches run, in evictions of leaves; starting a copy counts as
``COPY_WORK``. The rest is done in later steps. More loads adapters sooner and delays batches more.
Without a running batch there is no limit."""

COPY_WORK = 1
"""Work of starting a copy: it takes the scheduler as long as evicting this many leaves."""

ROOM_LEAVES = 2
"""Most leaves evicted per batch to have room for the next load. More delay the batch."""

ROOM_RETRY = 8
"""Batches after which the planner tries again to evict for the next load, if it found no victim
that may go without a copy to the host. Lower finds one sooner; each try takes 0.2 ms."""

EXPECTED_WITHIN = 1.0
"""Pool turnovers. Another load is expected within this time of the last one, and room is kept for
it. Raising it keeps room for longer, at the cost of cached KV."""

LAST_LOADS = 8
"""Number of past loads; room is kept for the largest of them."""

COPY_AHEAD_BELOW = 0.1
"""Share of free slots below which the next victims are copied to the host in advance."""

COPY_AHEAD_LEAVES = 4
"""Most next victims that are checked, and copied together."""

MAX_SESSIONS = 64
"""Most sessions whose KV is waiting to be loaded before their next request arrives."""

SESSION_LEAVES = 8
"""Most leaves evicted for the KV of one session."""


class Planner(Generic[N]):
    """Decides on loads, evictions and prefetches for one scheduler.

    Args:
        memory: The cache.
        costs: Measured rates.
    """

    def __init__(self, memory: Memory[N], costs: OnlineCosts) -> None:
        self._memory, self._online = memory, costs
        self._costs = costs.costs
        self.pending = PendingHints(memory.pool_slots)
        self._queued: dict[str, int] = {}  # adapter -> position of the first request for it
        self._sessions: dict[Hashable, int] = {}  # key of a session's end -> last step to load it
        self._num_busy_steps = 0
        self._work_left = sys.maxsize
        self._put_off: str | None = None  # adapter whose copy was put off in the last step
        self._last_loads: deque[int] = deque(maxlen=LAST_LOADS)  # slots of the last loads
        self._loaded_at = -math.inf  # policy clock at the last load
        self._no_room_before = 0  # batches launched before which there is no victim for room
        self._all_copied_at = -1.0  # policy clock when no victim was left to copy in advance

    # ==== Once per scheduler iteration ====

    def begin_step(self, *, is_busy: bool) -> None:
        """Begin an iteration. ``is_busy``: batches run, which long steps would delay."""
        self._work_left = WORK_PER_STEP if is_busy else sys.maxsize
        self._num_busy_steps += is_busy
        if is_busy:
            self.pending.step()

    def load(self, queue: Sequence[QueuedRequest], reserved: int = 0) -> None:
        """Start loads for the first queued requests, in their order, then for expected adapters.
        If none is queued, expected or in progress, load back one evicted entry into free slots.

        Args:
            queue: All queued requests.
            reserved: Slots for the next chunk of a prompt that is computed chunk by chunk.
        """
        had_copies = bool(self._memory.copies)
        if queue or self._queued or self.pending:
            self._load_queued(queue, reserved)
        elif self._memory.evicted and not had_copies and not reserved:
            self._load_back()

    def load_session(self) -> None:
        """Load the KV of the first announced session whose adapter is on the device; one session
        at a time."""
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
        """Read one file that was never read, if the scheduler and the readers are idle."""
        if not (queue or is_busy or self._memory.reading):
            self._memory.read_ahead()

    def prepare(self) -> bool:
        """Do one piece of work that makes later steps shorter. Returns whether there was any."""
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
            ordered: An order, not a hint: load them in any case and keep them for
                ``ORDER_STEPS``.

        Returns:
            Number of adapters that were accepted; the others are unknown or exceed the limit.
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

    def read_first(self, adapter_ids: Sequence[str]) -> None:
        """Read the files of these adapters into host memory before those of others, in this order,
        when the scheduler is idle. Files that were read before are not read again for this."""
        for adapter_id in reversed(adapter_ids):
            self._memory.read_first(adapter_id)

    def expect_sessions(self, sessions: Iterable[str]) -> int:
        """Requests of these sessions are about to arrive: load their KV from the host once their
        adapter is there, evicting nothing that queued requests need.

        Returns:
            Number of these sessions that are open.
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
        """Record that a request with this adapter runs."""
        self._online.popularity.use(adapter_id)
        self._memory.counts.hints_used += self.pending.used(adapter_id)

    def is_queued(self, adapter_id: str) -> bool:
        """Whether one of the first queued requests needs the adapter."""
        return self._queued.get(adapter_id, LOOKAHEAD) < LOOKAHEAD

    @property
    def is_limited(self) -> bool:
        """Whether the last step used up its work budget, so that the next should follow soon."""
        return self._work_left < COPY_WORK

    # ==== Admission ====

    def is_hidden(
        self, adapter_id: str, num_tokens: int, *, is_idle: bool, waits_whole: bool
    ) -> bool:
        """Whether a batch with this prompt may start before the adapter's copy has finished.

        It may if no other request can run, since nothing is delayed then. Otherwise the copies must
        take no longer than the computation before the batch needs them: batches launched since the
        copy was started, and the batch's own layers, as it waits for the weights layer by layer.
        The own computation of a batch that waits for the whole copy before it begins hides nothing.

        Args:
            num_tokens: Tokens of the prompt.
            is_idle: No other request could run instead.
            waits_whole: The batch is replayed from a prefill graph, or the adapter has weights for
                the embedding.
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
        # Lower bound of a batch's time: each batch reads all of the model's weights.
        hiding = (memory.num_launches - copy.launches_before) * costs.batch
        if not waits_whole:
            hiding += costs.batch + num_tokens * costs.recompute
        return copying <= hiding

    # ==== Loads ====

    def _load_queued(self, queue: Sequence[QueuedRequest], reserved: int) -> None:
        """Start loads of the adapters that the first queued requests need, as far as these requests
        and their adapters fit into the pool together.

        The first adapter is always included, unless slots are ``reserved``. Expected adapters are
        loaded one at a time, so that a load for a queued request waits for at most one of them, and
        at most one file is read for them at a time.
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
            elif has_room:  # otherwise a later adapter would take slots freed for an earlier one
                has_room = self._may_start(adapter) and self._place(adapter, queued[adapter_id])
                if has_room and is_expected:
                    self.pending.came(adapter_id)

    def _add_expected(self, queued: dict[str, int], missing: list[Adapter], room: int) -> None:
        """Add expected adapters after those of all queued requests, as far as ``room`` lasts."""
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
        """Whether a copy is in progress, or the file of another adapter is being read."""
        memory = self._memory
        return bool(memory.copies) or any(other != adapter_id for other in memory.reading)

    def _may_start(self, adapter: Adapter) -> bool:
        under_way = sum(copy.num_slots for copy in self._memory.copies.values())
        most = MAX_SLOTS_UNDER_WAY_SHARE * self._memory.pool_slots
        return not under_way or under_way + adapter.num_slots <= most

    def _place(self, adapter: Adapter, protect_up_to: int) -> bool:
        """Evict for an adapter whose weights are in host memory, and start its copy.

        Returns:
            Whether the copy was started; if not, a later call continues the evictions.
        """
        memory, adapter_id = self._memory, str(adapter.adapter_id)
        shortfall = adapter.num_slots - memory.free_slots()
        if shortfall > 0:
            eviction = Eviction(shortfall, protect_up_to, self._work_left)
            self._work_left -= memory.evict(eviction)
        if self._work_left < COPY_WORK and self._put_off != adapter_id:
            self._put_off = adapter_id  # only once, since others may take the freed slots
            return False
        self._put_off = None
        if not memory.start_copy(adapter_id):
            return False
        self._work_left -= COPY_WORK
        self._last_loads.append(adapter.num_slots)
        self._loaded_at = memory.policy.clock
        return True

    # ==== When idle ====

    def _load_back(self) -> None:
        """Load back one of the last evicted entries into free slots, without evicting."""
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
        """Evict some KV in advance, until a load of the size of the last ones finds free slots.

        A load that has to evict first takes several steps. If no adapter was loaded recently,
        nothing is evicted. KV that would have to be copied to the host first is kept, and so are
        adapters, whose eviction frees many slots in one step anyway.
        """
        memory = self._memory
        shortfall = max(self._last_loads, default=0) - memory.free_slots()
        if shortfall <= 0 or memory.policy.clock - self._loaded_at > EXPECTED_WITHIN:
            return False
        if memory.num_launches < self._no_room_before:
            return False
        eviction = Eviction(
            shortfall, sys.maxsize, ROOM_LEAVES, reason="proactive", takes_adapters=False
        )
        if memory.evict_without_copies(eviction):
            return True
        self._no_room_before = memory.num_launches + ROOM_RETRY
        return False

    def _copy_ahead(self) -> bool:
        """Copy the next victims to the host, so that their eviction does not wait for the copy."""
        memory = self._memory
        if not memory.may_copy_to_host:
            return False
        if memory.free_slots() > COPY_AHEAD_BELOW * memory.pool_slots:
            return False
        clock = memory.policy.clock
        if clock == self._all_copied_at:
            return False
        if memory.copy_ahead(COPY_AHEAD_LEAVES):
            self._no_room_before = 0
            return True
        self._all_copied_at = clock
        return False
