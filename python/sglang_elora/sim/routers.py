"""Routers of a simulated fleet, by the rules that are in use, and by placement.

``round-robin``; ``least-load``: fewest requests. ``prefer-loaded``: a server that has the adapter
on the device, drawn; if none has, any. ``prefer-loaded+load``: the highest sum of having the
adapter and of the free share of load, each with half of the weight, as gateways add up scores.
``hash-adapter``, ``hash-session``: consistent hashing with bounded loads. ``cache-aware``: SGLang's
router: the server that had most of the prompt, if that is more than 0.3 of it, otherwise the one
with the fewest requests; by load alone while loads differ much. ``placed``: the servers of
``fleet.Placement`` that are not overloaded or full, of these the one with the fewest requests and
sessions; a session stays where it is. Servers read the files of their own adapters first, and load
a new copy before its requests come.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_elora.fleet import Loads, Placement, preference
from sglang_elora.sim.engine import Engine
from sglang_elora.workloads import Session

BOUND = 1.25
"""Most requests of a server under consistent hashing, as a multiple of the mean."""

CACHE_SHARE = 0.3
IMBALANCE, IMBALANCE_RATIO = 64, 1.5
"""Defaults of SGLang's router: --cache-threshold, --balance-abs-threshold, --balance-rel-threshold.
"""

OVERLOAD, OVERLOAD_RATIO = 16, 1.5
"""``placed`` passes over a server with more requests than ``OVERLOAD`` plus ``OVERLOAD_RATIO``
times the mean. With 4 and 1.25, sessions often go where their adapter and its prompts are not
(8 servers at twice the table's rate, agent, one seed: P95 39 ms, 35 with 16)."""

FULL = 0.95
"""``placed`` begins no session at a server of whose pool running requests hold this share, unless
the adapter is there: the request would wait until others end (8 servers at 1.8 times the table's
rate, translation, one seed: P95 63 ms, 418 without)."""

RECENT_S, RECENT_WEIGHT = 20.0, 0.2
"""A new session goes to the server with the fewest requests, to which sessions that sent one in the
last ``RECENT_S`` add ``RECENT_WEIGHT`` each: they will send more. Without, P95 is 3% (chat) and 7%
(agent) higher (8 servers, one seed)."""

PERIOD_S = 5.0
"""Seconds between updates of the placement."""


@dataclass(eq=False, slots=True)
class Server:
    name: str
    engine: Engine
    num_requests: int = 0  # that wait or run, as the router knows
    usage: float = 0.0  # share of the pool that running requests hold


class Router(ABC):
    """Chooses the server of each turn."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def set_servers(self, servers: Sequence[Server]) -> None:
        """The fleet has changed."""
        return

    def begin_round(self, now_s: float, servers: Sequence[Server]) -> None:
        """The servers' numbers of requests are new."""
        return

    @abstractmethod
    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        """The server for a turn.

        Args:
            last: The server of the session's turn before; it may be lost.
        """

    def _least(self, servers: Sequence[Server]) -> Server:
        """The server with the fewest requests; drawn if there are several."""
        fewest = min(server.num_requests for server in servers)
        return self._rng.choice([s for s in servers if s.num_requests == fewest])


class RoundRobin(Router):
    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        self._next += 1
        return servers[self._next % len(servers)]


class LeastLoad(Router):
    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        return self._least(servers)


class PreferLoaded(Router):
    def __init__(self, load_weight: float = 0.0) -> None:
        super().__init__()
        self._load_weight = load_weight

    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        most = max(server.num_requests for server in servers) or 1
        scored = [
            (
                (1 - self._load_weight) * server.engine.has_adapter(session.adapter)
                + self._load_weight * (1 - server.num_requests / most),
                server,
            )
            for server in servers
        ]
        best = max(score for score, _ in scored)
        return self._rng.choice([server for score, server in scored if score == best])


class Hashed(Router):
    """Consistent hashing of ``key`` with bounded loads."""

    def __init__(self, key: Callable[[Session], str]) -> None:
        super().__init__()
        self._key = key
        self._servers: dict[str, Server] = {}

    def set_servers(self, servers: Sequence[Server]) -> None:
        self._servers = {server.name: server for server in servers}

    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        order = preference(self._key(session), tuple(self._servers))
        limit = BOUND * (1 + sum(server.num_requests for server in servers)) / len(servers)
        fits = (self._servers[n] for n in order if self._servers[n].num_requests + 1 <= limit)
        return next(fits, None) or self._least(servers)


class CacheAware(Router):
    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[tuple[str, Sequence[int]], Server] = {}  # who had a system prompt last

    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        least, most = self._least(servers), max(server.num_requests for server in servers)
        key, chosen = (session.adapter, session.system), least
        is_even = most - least.num_requests <= IMBALANCE or (
            most <= IMBALANCE_RATIO * least.num_requests
        )
        had = last or self._begun.get(key)
        if is_even and had is not None and had in servers:
            num_system = len(session.system)
            share = num_system / (num_system + len(session.turns[0].new_tokens))
            if last is not None or share > CACHE_SHARE:
                chosen = had
        self._begun[key] = chosen
        return chosen


class Placed(Router):
    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement([])
        self._servers: dict[str, Server] = {}
        self._loads = Loads()  # of adapters
        self._updated_s = 0.0
        self._adapters: dict[int, str] = {}  # of sessions, by number
        self._seen: Counter[str] = Counter()  # records of each server that are in the loads
        # Sessions by their last turn, the oldest first: (server, when).
        self._recent: OrderedDict[int, tuple[str, float]] = OrderedDict()
        self._num_recent: Counter[str] = Counter()  # sessions of each server
        self._now_s = 0.0
        self.num_copies = 0

    def set_servers(self, servers: Sequence[Server]) -> None:
        self._servers = {server.name: server for server in servers}
        self.placement.set_servers(self._servers)
        homes: defaultdict[str, list[str]] = defaultdict(list)
        for adapter in servers[0].engine.adapters:
            for name in self.placement.servers_of(adapter):
                homes[name].append(adapter)
        for name, adapters in homes.items():
            self._servers[name].engine.order(adapters, to_device=False)

    def begin_round(self, now_s: float, servers: Sequence[Server]) -> None:
        self._now_s = now_s
        while self._recent and next(iter(self._recent.values()))[1] < now_s - RECENT_S:
            self._num_recent[self._recent.popitem(last=False)[1][0]] -= 1
        if now_s - self._updated_s < PERIOD_S:
            return
        self._updated_s = now_s
        self._add_work(servers)
        loads = self._loads.decay(now_s)
        for copy in self.placement.update(loads) if loads else ():
            self.num_copies += 1
            self._servers[copy.server].engine.order([copy.adapter], to_device=True)

    def choose(
        self, session: Session, turn: int, servers: Sequence[Server], last: Server | None
    ) -> Server:
        self._adapters[session.number] = session.adapter
        chosen = self._choose(session, servers, last)
        if session.number in self._recent:
            self._num_recent[self._recent.pop(session.number)[0]] -= 1
        self._recent[session.number] = (chosen.name, self._now_s)
        self._num_recent[chosen.name] += 1
        return chosen

    def _choose(self, session: Session, servers: Sequence[Server], last: Server | None) -> Server:
        mean = sum(server.num_requests for server in servers) / len(servers)
        limit = OVERLOAD + OVERLOAD_RATIO * mean
        if last in servers and last is not None and last.num_requests < limit:
            return last

        def has(server: Server) -> bool:
            return server.engine.has_adapter(session.adapter)

        def fits(server: Server) -> bool:
            return server.num_requests < limit and (server.usage < FULL or has(server))

        mine = [self._servers[name] for name in self.placement.servers_of(session.adapter)]
        least = min([*filter(has, mine)] or mine, key=self._load)
        if fits(least):
            return least
        order = (self._servers[n] for n in preference(session.adapter, self.placement.servers))
        return next(filter(fits, order), least)

    def _load(self, server: Server) -> float:
        return server.num_requests + RECENT_WEIGHT * self._num_recent[server.name]

    def _add_work(self, servers: Sequence[Server]) -> None:
        """Add the tokens that servers have computed since then to the loads of their adapters."""
        for server in servers:
            records = server.engine.records
            for record in records[self._seen[server.name] :]:
                work = record.num_prompt - record.num_cached + record.num_output
                self._loads.add(self._adapters[record.session], work)
            self._seen[server.name] = len(records)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-load": LeastLoad,
    "prefer-loaded": PreferLoaded,
    "prefer-loaded+load": lambda: PreferLoaded(0.5),
    "hash-adapter": lambda: Hashed(lambda session: session.adapter),
    "hash-session": lambda: Hashed(lambda session: f"session-{session.number}"),
    "cache-aware": CacheAware,
    "placed": Placed,
}
