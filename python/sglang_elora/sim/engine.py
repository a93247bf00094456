"""Event-driven simulation of one server with continuous batching, for a trace.

A step is a prefill batch of the waiting requests that can be admitted within the token budget.
Otherwise it is decode steps of all running requests, up to the next arrival, completion or end of
an adapter's load. A request holds slots for its whole prompt and answer from its admission on.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from sglang_elora.estimators import OnlineCosts
from sglang_elora.policy import CacheEntry
from sglang_elora.sim.cache import Cache
from sglang_elora.sim.calibration import Calibration
from sglang_elora.sim.clairvoyant import Foreseer
from sglang_elora.sim.future import Future
from sglang_elora.sim.link import Link
from sglang_elora.sim.request import Record, Request, Talk
from sglang_elora.sim.residence import Residence
from sglang_elora.sim.segment import Segment
from sglang_elora.tree import Eviction, end_turn, fork
from sglang_elora.workloads import Session, Trace

MOST_LOOKED_AT = 128
"""Waiting requests considered per batch. Raising it admits from deeper in the queue."""

HINT_LEAD_S = 1.0
"""Seconds between a hint and the request that it announces."""

LOAD_BACK_THRESHOLD = 10
"""SGLang's minimum number of tokens to load back from the host; fewer are recomputed."""


OnAnswer = Callable[[Session, int, float, int], None]
"""Called with a session, the turn that was answered, when, and the tokens of the history now."""


class Engine:
    """The simulated server.

    Args:
        keeps_kv: Whether the KV of a request stays cached after its end.
        touches_at_end: The end of a request counts as a use of its path, as in SGLang.
        names_sessions: Requests name their session, and the end of the last one closes it.
        activated: Adapters that check a conversation are activated LoRAs, which use its KV.
        hints: The client sends a hint ``HINT_LEAD_S`` before each turn but the first; with a policy
            that knows the future, before the first one, too.
    """

    def __init__(
        self,
        calibration: Calibration,
        cache: Cache,
        residence: Residence,
        link: Link,
        costs: OnlineCosts,
        *,
        keeps_kv: bool = True,
        kv_needs_adapter: bool = True,
        touches_at_end: bool = False,
        names_sessions: bool = False,
        activated: bool = False,
        hints: bool = False,
    ) -> None:
        self._calibration, self._cache, self._residence = calibration, cache, residence
        self._link, self._costs = link, costs
        self._keeps_kv, self._kv_needs_adapter = keeps_kv, kv_needs_adapter
        self._touches_at_end, self._names_sessions = touches_at_end, names_sessions
        self._activated, self._hints = activated, hints
        self._systems: dict[tuple[Segment, Sequence[int]], Segment] = {}
        self._arrivals: list[tuple[float, int, Request | Talk]] = []  # a Talk stands for a hint
        self._waiting: list[Request] = []
        self._running: list[tuple[int, int, Request]] = []  # (last step, number, request)
        self._num_context = self._num_steps = self._num_requests = 0
        self._now_s, self._until_s, self._duration_s = 0.0, math.inf, math.inf
        self._future: Future | None = None
        self._talks: dict[int, Talk] = {}  # of sessions that ``send`` brought, by number
        self.on_answer: OnAnswer | None = None
        self.records: list[Record] = []

    def play(self, trace: Trace) -> list[Record]:
        """Simulate the trace; returns its records in order of completion.

        Raises:
            ValueError: The pool cannot hold one of the sessions.
        """
        self._duration_s = trace.duration_s
        if isinstance(self._cache.policy, Foreseer):
            self._future = Future(trace, self._cache.policy)
        for session in trace.sessions:
            if session.start_s < trace.duration_s and session.turns:
                self._arrive(self._begin(session), 0, session.start_s)
        while self.num_requests:
            self._step()
        return self.records

    def send(self, session: Session, turn: int, due_s: float, num_tokens: int) -> None:
        """Receive one turn; ``on_answer`` is told its answer.

        Args:
            due_s: When the client sent it.
            num_tokens: Tokens of the session's history, which other servers may have computed.

        Raises:
            ValueError: The pool cannot hold the session.
        """
        talk = self._talks.get(session.number)
        if talk is None:
            talk = self._talks[session.number] = self._begin(session)
        if self._keeps_kv:
            self._extend(talk.path, talk.adapter, num_tokens)
        talk.num_tokens = num_tokens
        self._arrive(talk, turn, due_s)

    def run_until(self, moment_s: float) -> None:
        """Simulate up to ``moment_s``, or to the end of the batch that runs then."""
        self._until_s = moment_s
        while self._now_s < moment_s:
            if self.num_requests:
                self._step()
            else:
                self._residence.read_ahead(self._now_s)
                self._now_s = min(moment_s, self._residence.next_s)

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._arrivals) + len(self._waiting) + len(self._running)

    @property
    def usage(self) -> float:
        """Share of the pool that cannot be evicted, as SGLang's metric ``token_usage``."""
        return 1.0 - (self._cache.free + self._cache.evictable) / self._cache.pool_slots

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters."""
        return [str(adapter.adapter_id) for adapter in self._cache.adapter_table]

    def order(self, names: Sequence[str], *, to_device: bool) -> None:
        """Receive an order to load adapters to the device, or into host memory only."""
        ids = [str(self._adapter(name).entry.group) for name in names]
        self._residence.order(ids, to_device=to_device)

    def has_adapter(self, name: str) -> bool:
        """Whether the adapter is on the device."""
        return self._residence.is_there(self._adapter(name))

    def forget(self, session: Session) -> None:
        """The session is over, or goes on with another server; its KV stays."""
        self._talks.pop(session.number, None)

    def unanswered(self) -> list[tuple[Session, int, float, int]]:
        """Arguments of ``send`` of all requests without an answer."""
        found = [r for _, _, r in self._arrivals if isinstance(r, Request)]
        found += [*self._waiting, *(request for _, _, request in self._running)]
        return [(r.talk.session, r.turn, r.due_s, r.talk.num_tokens) for r in found]

    def _step(self) -> None:
        self._receive()
        self._residence.step(self._now_s, self._waiting, is_busy=bool(self._running))
        if not (self._prefill() or self._decode()):
            self._idle()

    @property
    def num_loads(self) -> int:
        """Number of adapter loads."""
        return self._residence.num_loads

    @property
    def slots_to_device(self) -> int:
        """Slots copied over the link: adapters and KV, including unused prefetches."""
        return self._link.num_slots

    def reserved(self) -> int:
        """Slots reserved by running requests outside the tree."""
        return sum(request.num_reserved for _, _, request in self._running)

    def check_invariants(self) -> None:
        self._cache.check_invariants(self.reserved())

    # ==== Sessions ====

    def _begin(self, session: Session) -> Talk:
        adapter = self._adapter(session.adapter)
        checks = [check for turn in session.turns for check in turn.checks]
        users = [(adapter, 0)] + [
            (self._adapter(check.adapter), len(check.new_tokens) + check.num_output)
            for check in checks
        ]
        longest = session.num_tokens + max(
            user.num_slots * self._kv_needs_adapter + more for user, more in users
        )
        if longest > self._cache.pool_slots:
            raise ValueError(
                f"session {session.number} takes {longest} slots with its adapter, and the pool "
                f"has {self._cache.pool_slots}"
            )
        return Talk(session, adapter, self._begun(session, adapter), len(session.system))

    def _adapter(self, name: str) -> Segment:
        return self._cache.adapter(name) if name else self._cache.base

    def _begun(self, session: Session, adapter: Segment) -> list[Segment]:
        """The path of a session's system prompt with this adapter."""
        if not (session.system and self._keeps_kv):
            return []
        key = (adapter, session.system)
        system = self._systems.get(key)
        if system is None:
            system = self._systems[key] = self._kv(len(session.system), adapter, None)
        return [system]

    def _kv(self, num_slots: int, adapter: Segment, above: Segment | None) -> Segment:
        owner = adapter if self._kv_needs_adapter else self._cache.base
        is_activated = above is not None and above.adapter is not owner.adapter
        item = CacheEntry(False, num_slots, owner.adapter.adapter_id, is_activated)
        return Segment(item, owner.adapter, above or owner)

    def _check(self, talk: Talk, turn: int) -> None:
        """Send the checks of an answer, if it has some."""
        for check in talk.session.turns[turn].checks:
            adapter = self._adapter(check.adapter)
            path = self._checked(talk, adapter, check.adapter)
            asked = Talk(talk.session, adapter, path, talk.num_tokens, is_check=True)
            num_prompt = talk.num_tokens + len(check.new_tokens)
            self._push(self._now_s, Request(asked, turn, self._now_s, num_prompt, check.num_output))

    def _checked(self, talk: Talk, adapter: Segment, name: str) -> list[Segment]:
        """The path of the conversation so far as a check with this adapter finds it."""
        if adapter is talk.adapter or self._activated or not self._keeps_kv:
            return [*talk.path]
        path = talk.copies.setdefault(name, self._begun(talk.session, adapter))
        self._extend(path, adapter, talk.num_tokens)
        return [*path]

    def _extend(self, path: list[Segment], adapter: Segment, num_tokens: int) -> None:
        """Add to a path what a history of this length has beyond it; its last token was not
        computed by the request that generated it."""
        num_new = num_tokens - 1 - sum(segment.num_slots for segment in path)
        if num_new > 0:
            path.append(self._kv(num_new, adapter, path[-1] if path else None))

    def _arrive(self, talk: Talk, turn: int, due_s: float) -> None:
        said = talk.session.turns[turn]
        num_prompt = talk.num_tokens + len(said.new_tokens)
        request = Request(talk, turn, due_s, num_prompt, said.num_output)
        self._push(due_s, request)
        if self._hints and (turn > 0 or self._future is not None):
            self._push(max(self._now_s, due_s - HINT_LEAD_S), talk)

    def _push(self, moment_s: float, arrival: Request | Talk) -> None:
        self._num_requests += 1
        heapq.heappush(self._arrivals, (moment_s, self._num_requests, arrival))

    def _receive(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self._now_s:
            request = heapq.heappop(self._arrivals)[2]
            if isinstance(request, Talk):
                self._residence.expect(request)
                continue
            request.was_cold = not self._residence.is_there(request.talk.adapter)
            self._waiting.append(request)

    def _idle(self) -> None:
        arrival_s = self._arrivals[0][0] if self._arrivals else math.inf
        next_s = min(arrival_s, self._residence.next_s, self._until_s)
        if next_s == math.inf:
            raise RuntimeError(f"{len(self._waiting)} requests wait for nothing")
        self._residence.prepare(self._now_s, 1)
        self._now_s = max(self._now_s, next_s)

    # ==== Prefill ====

    def _prefill(self) -> bool:
        batch: list[Request] = []
        room = self._calibration.max_running - len(self._running)
        if not self._waiting or room <= 0:
            return False
        budget = self._calibration.prefill_budget
        is_idle, passed = not self._running, []
        load_s = self._now_s
        for position, request in enumerate(self._waiting):
            if len(batch) >= room or budget <= 0 or position >= MOST_LOOKED_AT:
                passed += self._waiting[position:]
                break
            if not self._residence.may_enter(request, batch, is_idle):
                passed.append(request)
                continue
            ends_s = self._enter(request, budget if batch else math.inf)
            if ends_s is None:
                passed += self._waiting[position:]
                break
            load_s = max(load_s, ends_s)
            budget -= request.num_prompt - request.num_cached
            batch.append(request)
        self._waiting = passed
        if batch:
            self._run(batch, load_s)
        return bool(batch)

    def _enter(self, request: Request, budget: float) -> float | None:
        """Admit a request; returns when its KV is loaded back, None if it does not fit."""
        cache, talk = self._cache, request.talk
        held, loaded, rest = self._find(talk.path)
        num_held = sum(segment.num_slots for segment in held)
        num_loaded = sum(segment.num_slots for segment in loaded)
        if num_loaded < LOAD_BACK_THRESHOLD:
            rest, loaded, num_loaded = [*loaded, *rest], [], 0
        if request.num_prompt - num_held - num_loaded > budget:
            return None
        self._residence.enter(request)
        for segment in held:
            cache.lock(segment)
        num_needed = request.num_prompt - num_held + request.num_output
        if not self._make_room(num_needed):
            for segment in held:
                cache.unlock(segment)
            self._residence.leave(request)
            return None
        for segment in loaded:
            cache.place(segment)
            cache.lock(segment)
        request.num_reserved = num_needed - num_loaded
        cache.reserve(request.num_reserved)
        request.locked, request.missing = [*held, *loaded], rest
        request.num_cached, request.num_from_host = num_held + num_loaded, num_loaded
        self._visit(request)
        if not loaded:
            return self._now_s
        return self._link.load_kv(self._now_s, num_loaded)

    def _make_room(self, num_slots: int) -> bool:
        """Evict for a request if that frees enough, as SGLang does; returns whether it did."""
        cache = self._cache
        if cache.free + cache.evictable < num_slots:
            return False
        if cache.free < num_slots:
            cache.evict(Eviction(num_slots - cache.free))
        return cache.free >= num_slots

    @staticmethod
    def _find(path: list[Segment]) -> tuple[list[Segment], list[Segment], list[Segment]]:
        """A path's segments on the device, those after them on the host, and the rest."""
        held = next((i for i, s in enumerate(path) if not s.on_device), len(path))
        end = next((i for i in range(held, len(path)) if not path[i].on_host), len(path))
        return path[:held], path[held:end], path[end:]

    def _visit(self, request: Request) -> None:
        used = request.locked[::-1]
        if self._kv_needs_adapter and not request.talk.adapter.is_base:
            used.append(request.talk.adapter)
        self._residence.used(request)
        if self._future is not None:
            self._future.used(request, [*request.missing, *used])
        if len(request.locked) == 1 and request.talk.session.system:
            fork(request.locked[0].entry, ())  # the prompt diverges after the system prompt
        self._cache.policy.visit(segment.entry for segment in used)

    def _run(self, batch: list[Request], load_s: float) -> None:
        calibration = self._calibration
        lengths = [(r.num_prompt - r.num_cached, r.num_cached) for r in batch]
        took_s = calibration.batch_s + sum(calibration.prefill_s(*pair) for pair in lengths)
        begun_s = self._residence.blocked_s(self._stalled_s(), batch)
        ready_s = max(load_s, self._residence.ready_s(begun_s, batch))
        end_s = max(begun_s + took_s, ready_s)
        self._costs.batch(begun_s, len(batch))
        if end_s == begun_s + took_s:
            self._costs.prefill(lengths, took_s)
        self._residence.prepare(begun_s, 1)
        self._now_s = end_s
        for request in batch:
            request.first_s = end_s
            for segment in request.missing:
                self._insert(request, segment)
            request.missing = []
            self._num_requests += 1
            last_step = self._num_steps + request.num_output - 1
            heapq.heappush(self._running, (last_step, self._num_requests, request))
            self._num_context += request.num_prompt + 1
        self._finish()

    def _stalled_s(self) -> float:
        """The time at which the scheduler continues after its evictions' copies to the host."""
        num_slots, self._cache.slots_to_host = self._cache.slots_to_host, 0
        return self._now_s + (self._calibration.to_host_s(num_slots) if num_slots else 0.0)

    def _insert(self, request: Request, segment: Segment) -> None:
        """Cache a computed segment in the request's slots, unless another request cached it."""
        cache = self._cache
        request.num_reserved -= segment.num_slots
        cache.release(segment.num_slots)
        if not segment.on_device:
            cache.place(segment)
        cache.lock(segment)
        request.locked.append(segment)

    # ==== Decode ====

    def _decode(self) -> bool:
        if not self._running:
            return False
        calibration, num = self._calibration, len(self._running)
        most = self._running[0][0] - self._num_steps
        arrival_s = self._arrivals[0][0] if self._arrivals else math.inf
        arrival_s = min(arrival_s, self._until_s)
        if self._waiting:
            arrival_s = min(arrival_s, self._residence.next_s)
        begun_s = self._stalled_s()
        steps = most
        if begun_s + calibration.decode_steps_s(most, num, self._num_context) > arrival_s:
            one_s = calibration.decode_s(num, self._num_context)
            steps = max(1, min(most, math.ceil((arrival_s - begun_s) / one_s)))
        self._now_s = begun_s + calibration.decode_steps_s(steps, num, self._num_context)
        self._costs.batch(self._now_s, num)
        self._residence.prepare(begun_s, steps)
        self._num_steps += steps
        self._num_context += steps * num
        self._finish()
        return True

    def _finish(self) -> None:
        while self._running and self._running[0][0] <= self._num_steps:
            self._end(heapq.heappop(self._running)[2])

    def _end(self, request: Request) -> None:
        cache, talk = self._cache, request.talk
        self._num_context -= request.num_prompt + request.num_output
        talk.num_tokens = request.num_prompt + request.num_output
        if self._keeps_kv:
            num_kept = sum(segment.num_slots for segment in talk.path)
            num_slots = talk.num_tokens - 1 - num_kept  # the last token was not computed
            above = talk.path[-1] if talk.path else None
            segment = self._kv(num_slots, talk.adapter, above)
            if self._future is not None:
                self._future.made(request, segment)
            cache.release(request.num_reserved)
            cache.place(segment)
            talk.path.append(segment)
            end_turn([segment.entry for segment in reversed(talk.path)])
        else:
            cache.release(request.num_reserved)
        request.num_reserved = 0
        if self._touches_at_end:
            cache.policy.visit(segment.entry for segment in reversed(talk.path))
        for segment in reversed(request.locked):
            cache.unlock(segment)
        self._residence.leave(request)
        self._record(request)
        if talk.is_check:
            return
        if self.on_answer is not None:
            self.on_answer(talk.session, request.turn, self._now_s, talk.num_tokens)
            return
        self._check(talk, request.turn)
        following = request.turn + 1
        if self._names_sessions:
            self._tell(talk, is_last=following == len(talk.session.turns))
        if following < len(talk.session.turns):
            due_s = self._now_s + talk.session.turns[following].think_s
            if due_s < self._duration_s:
                self._arrive(talk, following, due_s)

    def _tell(self, talk: Talk, *, is_last: bool) -> None:
        sessions = self._cache.sessions
        if talk.path[-1].is_cached:
            sessions.turn(talk.name, talk.path[-1])
        if is_last:
            sessions.over(talk.name)

    def _record(self, request: Request) -> None:
        self.records.append(
            Record(
                request.talk.session.number,
                request.turn,
                request.due_s,
                request.first_s,
                self._now_s,
                request.num_prompt,
                request.num_cached,
                request.num_from_host,
                request.num_output,
                request.was_cold,
                request.talk.is_check,
            )
        )
