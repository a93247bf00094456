"""Keeps each adapter of a fleet on the servers that its placement names.

A round reads the state of all servers (``GET /elora/state``) and returns orders for them. Nothing
is kept anywhere else: a controller that is started again takes over what the servers have, and one
that is dead leaves servers that decide alone, as soon as its leases are over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang_elora.fleet.loads import Loads
from sglang_elora.fleet.placement import NewCopy, Placement

State = Mapping[str, Any]
"""The JSON answer of ``GET /elora/state``."""

Rows = Mapping[str, Mapping[str, Any]]
"""Rows of the states' adapters, by server and name."""

LEASE_S = 60.0
"""Seconds that a new copy is pinned, until its requests have come and keep it."""

IDLE_S = 60.0
"""Seconds without a request after which a copy that is not wanted any more is evicted. Its sessions
lose KV on the device with it; the server's own policy evicts it sooner if it needs the room."""

MISSES = 2
"""Rounds in a row without an answer after which a server counts as lost."""

MOST_NAMES = 1000
"""Most adapters of one prefetch order, a limit of the endpoint."""

ON_DEVICE = ("device", "loading")


@dataclass(frozen=True, slots=True)
class Order:
    """A request to one server, ``POST /elora/{what}`` with ``body``, and why."""

    server: str
    what: Literal["prefetch", "pin", "evict"]
    body: Mapping[str, Any]
    why: str

    def __str__(self) -> str:
        names = self.body["lora_name"]
        told = names if isinstance(names, str) else f"{len(names)} adapters"
        tier = f" to the {self.body['tier']}" if "tier" in self.body else ""
        return f"{self.server}: {self.what} {told}{tier}: {self.why}"


class Controller:
    """Places adapters on servers, round by round.

    Args:
        servers: Their names, which must not change between starts: the order of servers for an
            adapter depends on them.
        now_s: Any clock in seconds.
    """

    def __init__(self, servers: Sequence[str], now_s: float) -> None:
        self.placement = Placement(servers)
        self._loads = Loads(now_s)
        self._misses = dict.fromkeys(servers, 0)
        self._before: dict[str, dict[str, int]] = {}  # tokens of each server's adapters so far
        self._told: dict[str, set[str]] = {}  # adapters that each server was told to read first
        self._is_new = True

    def round(self, states: Mapping[str, State | None], now_s: float) -> list[Order]:
        """The orders of one round.

        Args:
            states: By server; None: it did not answer, or drains.
        """
        present = {server: state for server, state in states.items() if state is not None}
        self._note_missing(states)
        if self._is_new and present:
            self.placement.restore(_places(present))
            self._is_new = False
        for server, state in present.items():
            self._add_work(server, state)
        loads = self._loads.decay(now_s)
        new = self.placement.update(loads) if loads and self.placement.servers else []
        rows = {
            server: {row["lora_name"]: row for row in state["adapters"]}
            for server, state in present.items()
        }
        return [*self._loads_of(new, rows), *self._evictions(rows), *self._reads(rows)]

    def _note_missing(self, states: Mapping[str, State | None]) -> None:
        for server, state in states.items():
            self._misses[server] = 0 if state is not None else self._misses.get(server, 0) + 1
            if self._misses[server] >= MISSES:
                self._before.pop(server, None)  # a server that is started again counts from zero
                self._told.pop(server, None)
        alive = [server for server in states if self._misses[server] < MISSES]
        if alive != [*self.placement.servers]:
            self.placement.set_servers(alive)

    def _add_work(self, server: str, state: State) -> None:
        before = self._before.get(server)
        now = {
            row["lora_name"]: row["computed_tokens"] + row["generated_tokens"]
            for row in state["adapters"]
        }
        if before is not None:
            for name, num_tokens in now.items():  # fewer than before if it was loaded again
                self._loads.add(name, max(num_tokens - before.get(name, 0), 0))
        self._before[server] = now

    def _loads_of(self, new: Iterable[NewCopy], rows: Rows) -> Iterator[Order]:
        """Load new copies; one beside others is pinned, because their requests keep those only."""
        for copy in new:
            row = rows.get(copy.server, {}).get(copy.adapter)
            if row is None or row["tier"] in ON_DEVICE or row["pinned"]:
                continue
            body: dict[str, Any] = {"lora_name": copy.adapter}
            if len(self.placement.servers_of(copy.adapter)) > 1:
                yield Order(copy.server, "pin", {**body, "lease_s": LEASE_S}, copy.why)
            else:
                yield Order(copy.server, "prefetch", body, copy.why)

    def _evictions(self, rows: Rows) -> Iterator[Order]:
        """Evict idle copies from servers that should not have them."""
        for server, of_server in rows.items():
            for name, row in of_server.items():
                is_free = row["tier"] == "device" and not (row["pinned"] or row["num_requests"])
                is_idle = row["idle_s"] is None or row["idle_s"] >= IDLE_S
                if is_free and is_idle and server not in self.placement.servers_of(name):
                    why = f"idle, and placed on {', '.join(self.placement.servers_of(name))}"
                    yield Order(server, "evict", {"lora_name": name}, why)

    def _reads(self, rows: Rows) -> Iterator[Order]:
        """Have each server read the files of its own adapters before those of others."""
        for server, of_server in rows.items():
            told = self._told.setdefault(server, set())
            wanted = [
                name
                for name, row in of_server.items()
                if row["tier"] == "disk"
                and name not in told
                and server in self.placement.servers_of(name)
            ]
            told.update(wanted)
            # The last order is read first: begin with the last names.
            for start in reversed(range(0, len(wanted), MOST_NAMES)):
                names = wanted[start : start + MOST_NAMES]
                body = {"lora_name": names, "tier": "host"}
                yield Order(server, "prefetch", body, "placed here, and never read")


def _places(states: Mapping[str, State]) -> dict[str, list[str]]:
    """The servers that have each adapter on the device, the one that used it last first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for server, state in states.items():
        for row in state["adapters"]:
            if row["tier"] in ON_DEVICE and row["idle_s"] is not None:
                found.setdefault(row["lora_name"], []).append((row["idle_s"], server))
    return {name: [server for _, server in sorted(places)] for name, places in found.items()}
