"""Which servers of a fleet should hold which adapters.

Each adapter has an order of preference over the servers, which depends on both names only
(rendezvous hashing: Thaler and Ravishankar, 1998), so that a server that is lost or added changes
the homes of about 1/N of the adapters. An adapter is on the first k servers of its order: k grows
with its load, so that no copy of it takes more than ``SHARE`` of a server. Servers whose adapters
have more than ``BOUND`` times the mean load are passed over (consistent hashing with bounded loads:
Mirrokni, Thorup, Zadimoghaddam, SODA 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

SHARE = 0.15
"""Load of one copy of an adapter, as a share of the mean load of a server. Lower spreads popular
adapters over more servers, each of which then needs room for them."""

BOUND = 1.25
"""Highest load of a server, as a multiple of the mean. Lower is more even and moves more."""

STAYS = 0.7
"""An adapter loses a copy only below this share of the load at which it would get that copy."""


@lru_cache(maxsize=2**16)
def preference(key: str, servers: tuple[str, ...]) -> tuple[str, ...]:
    """The servers in the order of an adapter, or of another key. Equal in all processes."""

    def weight(server: str) -> bytes:
        return blake2b(f"{key}\0{server}".encode(), digest_size=8).digest()

    return tuple(sorted(servers, key=weight))


@dataclass(frozen=True, slots=True)
class NewCopy:
    """An adapter that a server should get, and why."""

    adapter: str
    server: str
    why: str


class Placement:
    """The servers of each adapter, by the adapters' loads.

    Args:
        servers: Their names.
    """

    def __init__(self, servers: Iterable[str]) -> None:
        self.servers = tuple(servers)
        self._placed: dict[str, tuple[str, ...]] = {}

    def servers_of(self, adapter: str) -> Sequence[str]:
        """Servers that should answer the adapter's requests; an adapter without load has its
        first."""
        return self._placed.get(adapter) or preference(adapter, self.servers)[:1]

    def set_servers(self, servers: Iterable[str]) -> None:
        """Servers were lost or added. Takes effect on loads at the next ``update``."""
        self.servers = tuple(servers)
        known = frozenset(self.servers)
        self._placed = {
            adapter: left
            for adapter, placed in self._placed.items()
            if (left := tuple(server for server in placed if server in known))
        }

    def restore(self, placed: Mapping[str, Sequence[str]]) -> None:
        """Take over where adapters are, from before this object was made; the first servers are
        kept longest."""
        known = frozenset(self.servers)
        for adapter, servers in placed.items():
            if left := tuple(server for server in servers if server in known):
                self._placed[adapter] = left

    def update(self, loads: Mapping[str, float]) -> list[NewCopy]:
        """Place adapters for their loads; returns the new copies. Adapters without load keep the
        first server of their order only.

        Args:
            loads: Of adapters that have some, in any unit, for example tokens per second.
        """
        fair = sum(loads.values()) / len(self.servers)
        assigned = dict.fromkeys(self.servers, 0.0)
        before, self._placed = self._placed, {}
        new: list[NewCopy] = []
        for adapter in sorted(loads, key=lambda name: (-loads[name], name)):
            old = before.get(adapter, ())
            count = self._count(loads[adapter], fair, len(old))
            part = loads[adapter] / count
            chosen = self._choose(adapter, old, count, part, BOUND * fair, assigned)
            for server in chosen:
                assigned[server] += part
            self._placed[adapter] = chosen
            servers = "server" if count == 1 else "servers"
            why = f"{loads[adapter] / fair:.2f} of a server's load on {count} {servers}"
            new += [NewCopy(adapter, server, why) for server in chosen if server not in old]
        return new

    def _count(self, load: float, fair: float, before: int) -> int:
        """Servers for an adapter of this load."""
        wanted = load / (SHARE * fair)
        count = max(1, min(len(self.servers), math.ceil(wanted)))
        if count < before and wanted > STAYS * (before - 1):
            return before
        return count

    def _choose(
        self,
        adapter: str,
        old: Sequence[str],
        count: int,
        part: float,
        limit: float,
        assigned: Mapping[str, float],
    ) -> tuple[str, ...]:
        order = preference(adapter, self.servers)
        first = [server for server in order if server in old]
        rest = [server for server in order if server not in old]
        fits = [s for s in (*first, *rest) if assigned[s] + part <= limit]
        others = sorted((s for s in order if s not in fits), key=lambda s: assigned[s])
        return tuple([*fits, *others][:count])
