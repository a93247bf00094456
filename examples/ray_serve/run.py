"""Two replicas on Ray Serve: ways of routing, one replica instead, a kill, a rolling restart.

pip install 'sglang-elora[demo,ray]'
python examples/ray_serve/run.py
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from local import NAME, front_counts, local_ray, replicas
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sglang_elora.demo.__main__ import MODEL, launch_flags
from sglang_elora.demo.many_chats import Plan, Record, add_plan_flags, hold_chats
from sglang_elora.testbed.adapters import demo_adapters, make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import ServerProcess, free_port
from sglang_elora.testbed.signals import sigterm_acts_as_ctrl_c

NUM_REPLICAS = 2
BATCH = 16  # running requests of a replica
ONE_REPLICA = "one_replica"  # with the pool of all
SINGLE, WITH_KILL, WITH_RESTART = "one server", "a server killed", "rolling restart"


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    record: Record
    places: list[int]  # adapters that each server was asked for
    loads: list[int]  # adapters that each server loaded
    notes: dict[str, Any]


def adapters_and_loads(url: str) -> tuple[int, int]:
    state = httpx.get(f"{url}/elora/state", trust_env=False).json()
    served = sum(row["visits"] > 0 for row in state["adapters"])
    return served, state["pool"]["counts"]["adapter_loads"]


def play(name: str, url: str, servers: Sequence[str], plan: Plan) -> Row:
    """The chats at ``url``, and what the servers, started for them, have done at their end."""
    record = hold_chats(url, plan)
    places, loads = zip(*map(adapters_and_loads, servers), strict=True)
    return Row(name, record, list(places), list(loads), {})


class Event:
    """Something that happens once, in a thread, when a third of the turns are answered."""

    def __init__(self, plan: Plan, act: Callable[[], dict[str, Any]]) -> None:
        self._at, self._act, self.notes = plan.num_requests // 3, act, dict[str, Any]()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __call__(self, num_answered: int) -> None:
        if num_answered == self._at:
            self._thread.start()

    def _run(self) -> None:
        self.notes = self._act()

    def wait(self) -> dict[str, Any]:
        self._thread.join()
        return self.notes


def kill_a_server() -> dict[str, Any]:
    """SIGKILL for one replica's server; returns when there are two replicas again."""
    before, counts = replicas(), front_counts()
    os.kill(before[0]["pid"], signal.SIGKILL)
    killed_s = time.perf_counter()
    kept = {replica["replica"] for replica in before[1:]}
    while True:
        now = {replica["replica"] for replica in replicas()}
        if len(now) == len(before) and before[0]["replica"] not in now and kept <= now:
            seconds = time.perf_counter() - killed_s
            sums = {key: value - counts[key] for key, value in front_counts().items()}
            return {"seconds until there were two replicas again": seconds, **sums}
        time.sleep(0.5)


def with_event(name: str, url: str, plan: Plan, act: Callable[[], dict[str, Any]]) -> Row:
    event = Event(plan, act)
    record = hold_chats(url, plan, event)
    return Row(name, record, [], [], event.wait())


def main() -> None:
    from app import application
    from ray import serve
    from routing import ROUTINGS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = [ONE_REPLICA, *ROUTINGS]
    parser.add_argument("--routings", nargs="+", choices=ways, default=ways)
    parser.add_argument("--no-events", action="store_true", help="no kill, no restart")
    add_plan_flags(parser)
    parser.add_argument("--slots", type=int, default=16_000, help="of a replica [%(default)s]")
    parser.add_argument("--port", type=int, default=free_port())
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="[%(default)s]")
    options = parser.parse_args()
    silence_progress_bars()
    folder: Path = options.dir.resolve()
    checkpoint = make_checkpoint(folder / "checkpoint")
    adapters = make_adapters(checkpoint, folder / "adapters", demo_adapters(options.adapters))
    plan = Plan(list(adapters), options.sessions, options.turns)
    console = Console(width=110)

    def flags(num_parts: int) -> list[str]:
        sizes = ("--max-total-tokens", str(options.slots * num_parts))
        batch = ("--max-running-requests", str(BATCH * num_parts))
        return launch_flags(checkpoint, adapters, [*sizes, *batch])

    def engines(routing: str, release: str = "") -> Any:
        return application(flags(1), folder / "logs", model=MODEL, routing=routing, release=release)

    def engine() -> Any:
        part = {"num_replicas": 1, "max_ongoing_requests": 64}
        return application(flags(NUM_REPLICAS), folder / "logs", model=MODEL, **part)

    def roll() -> dict[str, Any]:
        began_s = time.perf_counter()
        serve.run(engines("adapter_session", release="2"), name=NAME)
        return {"seconds until both were replaced": time.perf_counter() - began_s}

    rows = []
    with sigterm_acts_as_ctrl_c():
        console.print(f"{SINGLE} ...")
        with ServerProcess(flags(NUM_REPLICAS), log_path=folder / "logs/single.log") as server:
            rows.append(play(SINGLE, server.url, [server.url], plan))
        with local_ray(options.port) as url:
            for routing in options.routings:
                console.print(f"{routing} ...")
                serve.run(engine() if routing == ONE_REPLICA else engines(routing), name=NAME)
                rows.append(play(routing, url, [each["url"] for each in replicas()], plan))
                serve.delete(NAME)
            events = () if options.no_events else ((WITH_KILL, kill_a_server), (WITH_RESTART, roll))
            if events:
                serve.run(engines("adapter_session"), name=NAME)
            for name, act in events:
                console.print(f"{name} ...")
                rows.append(with_event(name, url, plan, act))
    show(console, rows)


def show(console: Console, rows: Sequence[Row]) -> None:
    """The tables. All answers are compared with those of the first row."""
    table = Table("routing", box=SIMPLE)
    for column in ("adapters", "loads", "in the cache", "mean TTFT", "p95", "failed", "different"):
        table.add_column(column, justify="right")
    for row in rows:
        record = row.record
        table.add_row(
            row.name,
            " + ".join(map(str, row.places)),
            " + ".join(map(str, row.loads)),
            f"{record.cached_share:.1%}",
            f"{statistics.mean(record.ttft_s):.3f} s",
            f"{statistics.quantiles(record.ttft_s, n=20)[-1]:.3f} s",
            str(len(record.failures)),
            str(record.num_different(rows[0].record)),
        )
    console.print(table)
    for row in rows:
        for what, value in row.notes.items():
            number = f"{value:.1f}" if isinstance(value, float) else str(value)
            console.print(f"{row.name}: {what}: {number}")
        for failure in row.record.failures[:5]:
            console.print(f"{row.name}: failed: {failure}", style="dim", markup=False)


if __name__ == "__main__":
    main()
