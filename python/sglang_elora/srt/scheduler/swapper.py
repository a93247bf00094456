"""The swapper: what moves between file, host memory and device, a bounded part of it per step.

Called by the scheduler once per iteration, between receiving requests and choosing the next batch.
A step settles what is over, and starts what the first waiting requests need, in their order: a
file is read into host memory, an adapter is copied into slots. What a request waits for begins to
move in the step after its arrival, however far back in the queue it is within ``LOOKAHEAD``, and
nothing is evicted for it that an earlier one waits for. With nobody waiting and room to spare, the
dearest of what was evicted comes back. What can be done beforehand is done while a batch runs
(``prepare``): a load that comes finds room then, and no step before a batch has to make it.

All ranks of a tensor-parallel group take the same decisions: these rest on the queue, the tree and
on what ``settling.py`` agrees on about reads and copies.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.scheduler import _make_abort_req

from sglang_elora.srt.measure import Measure
from sglang_elora.srt.mem_cache.adapter_node import FULL, AdapterNode
from sglang_elora.srt.mem_cache.residency import PURGE_NODES, Residency
from sglang_elora.srt.scheduler.parts import elora_of
from sglang_elora.srt.scheduler.settling import Settling
from sglang_elora.swapper import ORDER_STEPS, AdapterCopy, Expected
from sglang_elora.tree import Adapter

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId, UnifiedTreeNode

logger = logging.getLogger(__name__)

LOOKAHEAD = 64
"""Waiting requests whose adapters are brought in before it is their turn."""

MAX_SLOTS_UNDER_WAY_SHARE = 0.25
"""Of the pool: copies under way. What is placed cannot be evicted until it is there."""

PREFETCH_BELOW = 0.7
"""Share of the pool in use below which what was evicted is brought back."""

PREFETCH_LOOKS = 8
"""Most evictions looked at per step."""

WORK_PER_STEP = 3
"""What a step may do while batches run, in evictions of leaves; the start of a copy counts as
``COPY_WORK``. The rest goes on in the next step. With no batch to delay, all is done at once."""

ROOM_LEAVES = 2
"""Evicted behind the start of a batch, most of them, to have room for the next load."""

COPY_AHEAD_BELOW = 0.1
"""Share of the pool that is free, below which what goes next is copied to the host beforehand."""

COPY_AHEAD_LEAVES = 4
"""Looked at and copied at a time."""

MOST_TURNS = 64
"""Sessions whose KV is to come from the host before their next request is taken."""

TURN_LEAVES = 8
"""Evicted at most for the KV of one of them."""

EVICT_LEAVES = 16
"""Of an adapter that is to leave, behind the start of a batch."""

_IDLE_S = 200e-6


class Swapper:
    """One per scheduler process.

    Args:
        residency: Where adapters are.
        measure: What copies and prefill take.
    """

    def __init__(self, residency: Residency, measure: Measure) -> None:
        self.residency = residency
        self._core, self._host, self._costs = residency.core, residency.host, measure.costs
        self._measure = measure
        self._wanted: dict[str, int] = {}  # adapter -> position of the first request for it
        self._expected = Expected(residency.pool_slots)
        self._settling = Settling(residency, measure, self._expected)
        self._turns: dict[NodeId, int] = {}  # end of a session -> step up to which
        self._leaving: dict[str, None] = {}  # adapters that are to be evicted
        self._num_busy_steps = 0
        self._core.forest.on_removed = measure.popularity.forget
        self._all_copied_at = -1.0  # by the policy's clock: nothing was left to copy ahead

    def step(self, scheduler: Scheduler, *, is_busy: bool) -> None:
        """Settle what is over and start what is needed next. Never blocks.

        Args:
            is_busy: Whether batches run.
        """
        self.residency.work_left = WORK_PER_STEP if is_busy else sys.maxsize
        self._num_busy_steps += is_busy
        if is_busy:
            self._expected.step()
        self._settling.begin_step()
        self._fail_waiting(scheduler)
        waiting, under_way = scheduler.waiting_queue, len(self.residency.copies)
        if waiting or self._wanted or self._expected:
            self._bring_wanted(waiting, self._rest_of(scheduler.chunked_req))
        elif self._core.evicted and not under_way and scheduler.chunked_req is None:
            self._prefetch()
        self._settling.confirm()  # before anything is done with the adapter
        self._fail_waiting(scheduler)
        if self._turns:
            self._bring_turn()
        if not (waiting or is_busy or self._host.reading):
            self._host.read_ahead()
        self._host.drop_surplus()
        if not is_busy:
            self.prepare()

    def prepare(self) -> None:
        """What makes later steps shorter or better. A batch has just begun, or none is to run."""
        self._core.refresh_order()
        is_done = (
            self._evict_leaving()
            or self.residency.purge_retired(PURGE_NODES)
            or self._measure.take_over()
            or self._core.learn()
            or self.residency.keep_room(ROOM_LEAVES)
        )
        if not is_done:
            self._copy_ahead()

    def is_hidden(self, copy: AdapterCopy, req: Req, adder: PrefillAdder) -> bool:
        """Whether a batch with this request may be started before the copy is over.

        That delays nothing where nothing else can run. Otherwise the copies must take no longer
        than what runs before the batch needs them: batches launched since the copy was started,
        and, if the batch waits for each layer's weights as it reaches the layer, its own
        computation. A batch that is replayed from a prefill graph waits for the whole copy before
        it begins, so its own computation hides nothing.
        """
        if not copy.confirmed:
            return False
        if not adder.can_run_list and adder.running_batch.is_empty():
            return True
        costs, slots = self._costs, 0
        for other in self.residency.copies.values():
            slots += other.num_slots
            if other is copy:
                break
        copying = slots * costs.load + costs.load_latency
        num_tokens = len(req.origin_input_ids)
        # The least that a batch takes: each of them reads all of the model's weights.
        hiding = (self.residency.num_launches - copy.launches_before) * costs.batch
        if not self._replays_graph(num_tokens, adder):
            hiding += costs.batch + num_tokens * costs.recompute
        return copying <= hiding

    def _replays_graph(self, num_tokens: int, adder: PrefillAdder) -> bool:
        """Whether the batch being formed is replayed from a prefill graph, as far as is known: by
        the requests chosen so far and one more, whose prefill the chunk size limits."""
        if adder.rem_chunk_tokens is not None:
            num_tokens = min(num_tokens, adder.rem_chunk_tokens)
        num_requests = len(adder.can_run_list) + 1
        return self.residency.replays_prefill_graph(
            num_requests, adder.log_input_tokens + num_tokens
        )

    def expect(self, uids: Iterable[str], *, ordered: bool = False) -> int:
        """Requests with these adapters are about to come: what they need is brought in behind what
        requests wait for, and nothing that these need is given up for it.

        Args:
            ordered: This is no hint, they have to come and to stay for a while (``Expected``).

        Returns:
            How many of them are expected now; others are unknown, or there are too many.
        """
        counts, forest, num_taken = self._core.counts, self.residency.forest, 0
        for uid in uids:
            is_known = uid in forest and not forest.get(uid).retired
            if not is_known or not self._expected.add(uid, ordered=ordered):
                counts["hints_dropped"] += 1
                continue
            counts["hints"] += 1
            counts["hints_late"] += self._is_waited_for(uid)
            self._leaving.pop(uid, None)
            num_taken += 1
        return num_taken

    def expect_turns(self, sessions: Iterable[str]) -> int:
        """Requests of these sessions are about to come: what the host has of their KV is brought in
        once their adapter is there, and nothing that requests wait for is given up for it.

        Returns:
            How many of them are alive.
        """
        num_alive = 0
        for session in sessions:
            end = self._core.sessions.end_of(session)
            num_alive += end is not None
            if end is not None and end.evicted and len(self._turns) < MOST_TURNS:
                self._turns.setdefault(end.id, self._num_busy_steps + ORDER_STEPS)
        return num_alive

    def evict_soon(self, uid: str) -> None:
        """Have an adapter and its KV leave the device, a bounded part of it per step.

        Raises:
            ValueError: A request uses it or waits for it, or it is pinned.
        """
        is_pinned = self.residency.forest.get(uid).pinned  # also before it is on the device
        if is_pinned or self._core.is_locked(uid) or self._is_waited_for(uid):
            raise ValueError("a request uses the adapter or waits for it, or it is pinned")
        self._expected.forget(uid)
        if self.residency.forest.get(uid).resident:
            self._leaving[uid] = None

    def used(self, uid: str) -> None:
        """A request with this adapter runs."""
        self._measure.popularity.use(uid)
        self.residency.forest.used(uid, time.monotonic())
        self._core.counts["hints_used"] += self._expected.used(uid)

    @property
    def is_waiting(self) -> bool:
        """Whether something is under way, for which there must be a next step soon."""
        return bool(self.residency.copies or self._host.reading or self.residency.is_purging)

    def _prefetch(self) -> None:
        """Bring back one of what was evicted last, into room that nobody uses."""
        cache, core = self.residency.cache, self._core
        room = self.residency.allocator.available_size()
        room -= (1 - PREFETCH_BELOW) * self.residency.pool_slots
        if room <= 0 or cache.ongoing_load_back:
            return
        for _ in range(min(len(core.evicted), PREFETCH_LOOKS)):
            node = core.find(core.evicted.pop())
            if node is None or node.item.num_slots > room or not self._bring_back(node):
                continue
            node.item.prefetched = True
            core.counts["prefetched_slots"] += node.item.num_slots
            return

    def _bring_turn(self) -> None:
        """KV of the first session that can have it; one at a time."""
        cache, core = self.residency.cache, self._core
        if cache.ongoing_load_back:
            return
        for node_id, last_step in [*self._turns.items()]:
            end = core.find(node_id)
            if end is None or not end.evicted or last_step < self._num_busy_steps:
                del self._turns[node_id]
                continue
            path = core.path_of(end)
            if path[-1].item.is_adapter and not self.residency.is_usable(path[-1].adapter):
                continue
            del self._turns[node_id]
            missing = [node for node in path if node.evicted]
            with core.full.sparing(LOOKAHEAD, TURN_LEAVES):
                if cache.load_back(node_id):
                    cache.start_loads()
                    for node in missing:
                        node.item.prefetched = True
                        core.counts["prefetched_slots"] += node.item.num_slots
            return

    def _copy_ahead(self) -> None:
        """Have copies of what is evicted next, whose eviction would have to wait for them."""
        cache, core = self.residency.cache, self._core
        if not core.is_write_back or cache.ongoing_write_through:
            return
        room = self.residency.allocator.available_size()
        if room > COPY_AHEAD_BELOW * self.residency.pool_slots:
            return
        if core.clock == self._all_copied_at:
            return
        copies = core.copies_ahead(COPY_AHEAD_LEAVES)
        for copy in copies:
            core.counts["kv_slots_copied_ahead"] += cache._execute_and_commit_kv_backup(copy)
        cache.flush_pending_backups()
        if not copies:
            self._all_copied_at = core.clock

    def _bring_back(self, node: UnifiedTreeNode) -> bool:
        if isinstance(node, AdapterNode):
            uid = str(node.adapter.uid)
            ready = not node.adapter.resident and not node.adapter.retired and uid in self._host
            room = self.residency.allocator.available_size()
            return ready and node.adapter.num_slots <= room and self.residency.place(uid, LOOKAHEAD)
        above = node.parent.component_data[FULL].value
        # An adapter that is not there has an empty value; the base model's root has [].
        if not node.evicted or not node.backuped or above is None:
            return False
        if isinstance(node.parent, AdapterNode) and not self.residency.is_usable(
            node.parent.adapter
        ):
            return False
        cache = self.residency.cache
        if not cache.load_back(node.id):
            return False
        cache.start_loads()
        return True

    def _fail_waiting(self, scheduler: Scheduler) -> None:
        """Requests whose adapter could not be brought in end with the reason."""
        errors = self._settling.take_errors()
        if not errors:
            return
        for req in [r for r in scheduler.waiting_queue if r.lora_id in errors]:
            error = errors[req.lora_id]
            name = self.residency.name_of(req.lora_id)
            reason = {
                "type": "abort",
                "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
                "message": f"LoRA adapter '{name}' cannot be loaded: {error}",
            }
            self._core.counts["requests_failed"] += 1
            scheduler.waiting_queue.remove(req)
            scheduler._release_aborted_request(req)
            answer = _make_abort_req(req, finished_reason=reason)
            scheduler.ipc_channels.send_to_tokenizer.send_output(answer, req)

    def _rest_of(self, chunked: Req | None) -> int:
        """Slots for what is left to compute of a prompt that is computed chunk by chunk.

        SGLang takes its next chunk without asking, and ends if there is no room for it.
        """
        if chunked is None:
            return 0
        page_size: int = self.residency.allocator.page_size
        num_left: int = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
        return num_left + page_size

    def _bring_wanted(self, waiting: list[Req], reserved: int) -> None:
        """Start what the first waiting requests need, as far as the pool can hold it with them.

        The first of them only has to fit by itself, unless slots are ``reserved``. What nobody
        waits for comes one after the other, so that a load that somebody does wait for has one of
        them ahead of it, and one file is read beside it, at most.
        """
        wanted: dict[str, int] = {}
        missing: list[Adapter] = []
        core = self._core
        room = self.residency.allocator.available_size() + core.evictable_size() - reserved
        for position, req in enumerate(islice(waiting, LOOKAHEAD)):
            uid = req.lora_id
            room -= len(req.origin_input_ids)
            if uid is not None and uid not in wanted:
                node = core.node_of(uid)
                adapter = node.adapter
                if node.component_data[FULL].lock_ref == 0:  # others have theirs
                    room -= adapter.num_slots
                if room >= 0 or not (wanted or reserved):
                    wanted[uid] = position
                    core.set_wanted(node, position)
                    if not adapter.resident and not adapter.retired:
                        missing.append(adapter)
            if room < 0:
                break
        else:
            self._add_expected(wanted, missing, room)
        self._forget_unwanted(wanted)
        has_room = True
        for adapter in missing:
            uid = str(adapter.uid)
            if wanted[uid] == LOOKAHEAD and self._is_moving(uid):
                break
            if uid not in self._host:
                self._host.request(uid)
            elif has_room:  # what is freed for one is not taken by one behind it
                has_room = self._may_start(adapter) and self.residency.place(uid, wanted[uid])
                if has_room and wanted[uid] == LOOKAHEAD:
                    self._expected.came(uid)

    def _is_moving(self, uid: str) -> bool:
        """Whether an adapter is under way, or read, and not this one."""
        copies, reading = self.residency.copies, self._host.reading
        return bool(copies) or any(other != uid for other in reading)

    def _add_expected(self, wanted: dict[str, int], missing: list[Adapter], room: int) -> None:
        """What hints and orders named, behind all who wait; they are held to ``room`` as well."""
        hinted_slots, expected = 0, self._expected
        for uid in expected.due():
            if uid in wanted:
                continue
            if uid not in self.residency.forest or self.residency.forest.get(uid).retired:
                expected.forget(uid)
                continue
            node = self._core.node_of(uid)
            num_slots, is_there = node.adapter.num_slots, node.adapter.resident
            if not expected.is_followed(uid, num_slots, hinted_slots, is_there=is_there):
                continue
            hinted_slots += num_slots * expected.is_hint(uid)
            if node.component_data[FULL].lock_ref == 0:
                room -= num_slots
            if room < 0:
                break
            wanted[uid] = LOOKAHEAD
            self._core.set_wanted(node, LOOKAHEAD)
            if not is_there:
                missing.append(node.adapter)

    def _evict_leaving(self) -> bool:
        """Some of what was told to leave. Whether there was something."""
        if not self._leaving:
            return False
        uid = next(iter(self._leaving))
        is_over = uid not in self.residency.forest or self._is_waited_for(uid)
        if is_over or self.residency.evict_branch(uid, EVICT_LEAVES):
            del self._leaving[uid]
        return True

    def _is_waited_for(self, uid: str) -> bool:
        """By a request, not only expected."""
        return self._wanted.get(uid, LOOKAHEAD) < LOOKAHEAD

    def _forget_unwanted(self, wanted: dict[str, int]) -> None:
        forest = self.residency.forest
        for uid in [uid for uid in self._wanted if uid not in wanted]:  # equal on all ranks
            self._host.cancel(uid)
            if uid in forest:
                self._core.set_wanted(self._core.node_of(uid), None)
                self._host.lower(uid)
        self._wanted = wanted

    def _may_start(self, adapter: Adapter) -> bool:
        under_way = sum(copy.num_slots for copy in self.residency.copies.values())
        most = MAX_SLOTS_UNDER_WAY_SHARE * self.residency.pool_slots
        return not under_way or under_way + adapter.num_slots <= most


def step(
    self: Scheduler,
    running_batch: ScheduleBatch,
    last_batch: ScheduleBatch | None,
    *_: Any,
    **__: Any,
) -> None:
    """Before ``Scheduler.get_next_batch_to_run``."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.step(self, is_busy=last_batch is not None or not running_batch.is_empty())


def prepare(result: Any, self: Scheduler, *_: Any, **__: Any) -> None:
    """After ``Scheduler.run_batch``: the device is at work now."""
    elora = elora_of(self)
    if elora is not None:
        elora.swapper.prepare()
        elora.residency.launched()  # what was evicted just now is free, as of this batch


def idle(result: None, self: Scheduler) -> None:
    """After ``Scheduler.on_idle``. Threads that read files need the interpreter."""
    elora = elora_of(self)
    if elora is not None and elora.swapper.is_waiting:
        time.sleep(_IDLE_S)


def sleep_on_idle(original: Callable[[Scheduler], None], self: Scheduler) -> None:
    """Around ``Scheduler.maybe_sleep_on_idle``, which wakes up for messages only."""
    elora = elora_of(self)
    if elora is None or not elora.swapper.is_waiting:
        original(self)
