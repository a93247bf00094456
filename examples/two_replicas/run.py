"""Two replicas behind SGLang's router: sessions stay where their adapter and KV are, or do not.

    pip install 'sglang-elora[demo,router]'
    python examples/two_replicas/run.py

The same chats are held with each way of routing, with one server of the same total pool, and once
more while a replica is killed. Before each, all servers are emptied.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sglang_elora.demo.__main__ import launch_flags
from sglang_elora.demo.many_chats import Plan, Record, add_plan_flags, hold_chats
from sglang_elora.testbed.adapters import demo_adapters, make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import ServerProcess, free_port, python_module

NUM_REPLICAS = 2
POOL_SLOTS = 16_000  # of a replica
BATCH = 16  # running requests of a replica
ROUTING_KEY = "X-SMG-Routing-Key"  # the header that the router's policy "manual" goes by
SESSION, SESSION_END = "X-Request-Id-Session", "X-Request-Id-Session-End"  # read by the replicas


@dataclass(frozen=True, slots=True)
class Route:
    """The router's policy, and the key that a request with this session and adapter carries."""

    flags: tuple[str, ...]
    key: Callable[[str, str], str] | None = None

    def headers(self, session: str, adapter: str, is_last: bool) -> dict[str, str]:
        """Headers of a turn. They also name its session to the replicas, and end it."""
        found = {SESSION: session, SESSION_END: str(is_last).lower()}
        if self.key is not None:
            found[ROUTING_KEY] = self.key(session, adapter)
        return found


_BY_KEY = ("--policy", "manual", "--assignment-mode", "min_group")
ROUTES: Mapping[str, Route] = {
    "round_robin": Route(("--policy", "round_robin")),
    "cache_aware": Route(("--policy", "cache_aware")),
    "session": Route(_BY_KEY, lambda session, adapter: session),
    "adapter": Route(_BY_KEY, lambda session, adapter: adapter),
}


@dataclass(frozen=True, slots=True)
class Counts:
    """What a replica has done since its start; ``visits`` are requests by adapter."""

    requests: int
    adapter_loads: int
    prompt_tokens: int
    cached_tokens: int
    visits: Mapping[str, int]

    def since(self, before: Counts) -> dict[str, int]:
        """The difference, and how many ``adapters`` were asked for."""
        served = [name for name in self.visits if self.visits[name] > before.visits[name]]
        found = {
            name: getattr(self, name) - getattr(before, name)
            for name in ("requests", "adapter_loads", "prompt_tokens", "cached_tokens")
        }
        return {"adapters": len(served), **found}


def counts(url: str) -> Counts:
    """From a replica's own state and metrics."""
    state = httpx.get(f"{url}/elora/state", trust_env=False).json()
    visits = {row["lora_name"]: row["visits"] for row in state["adapters"]}
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return Counts(
        requests=sum(visits.values()),
        adapter_loads=state["pool"]["counts"]["adapter_loads"],
        prompt_tokens=int(sums.get("sglang:prompt_tokens_total", 0)),
        cached_tokens=int(sums.get("sglang:cached_tokens_total", 0)),
        visits=visits,
    )


def empty(url: str, adapters: Sequence[str]) -> None:
    """Neither KV nor adapters are on this replica's device any more."""
    with httpx.Client(base_url=url, trust_env=False) as http:
        http.post("/flush_cache").raise_for_status()
        for name in adapters:
            http.post("/elora/evict", json={"lora_name": name}).raise_for_status()
        deadline = time.monotonic() + 20
        while http.get("/elora/state").json()["pool"]["num_on_device"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}: adapters do not leave the device")
            time.sleep(0.1)


def replica(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    log_path: Path,
    num_parts: int = 1,
    port: int | None = None,
) -> ServerProcess:
    """A server with the pool and the batch of ``num_parts`` replicas."""
    flags = ("--max-total-tokens", str(POOL_SLOTS * num_parts), "--enable-metrics")
    batch = ("--max-running-requests", str(BATCH * num_parts))
    command = launch_flags(checkpoint, adapters, (*flags, *batch))
    return ServerProcess(command, log_path=log_path, port=port)


def router(urls: Sequence[str], route: Route, log_path: Path) -> ServerProcess:
    flags = (
        *("--worker-urls", *urls, *route.flags, "--worker-startup-check-interval", "1"),
        # A replica that drains is not ready: it gets no more requests, and loses none.
        *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"),
        *("--health-failure-threshold", "1", "--health-success-threshold", "1"),
    )
    ports = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
    program = python_module("sglang_router.launch_router")
    return ServerProcess([*flags, *ports], log_path=log_path, program=program)


def wait_for_workers(url: str) -> None:
    """The router answers before it knows its replicas."""
    deadline = time.monotonic() + 60
    while True:
        workers = httpx.get(f"{url}/workers", trust_env=False).json()["workers"]
        if len(workers) == NUM_REPLICAS and all(worker["is_healthy"] for worker in workers):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the router has found {len(workers)} of {NUM_REPLICAS} replicas")
        time.sleep(0.1)


def play(
    urls: Sequence[str], route: Route, plan: Plan, log_path: Path
) -> tuple[list[dict[str, int]], Record]:
    """What each of these replicas did, empty before, and what the chats saw."""
    for url in urls:
        empty(url, plan.adapters)
    before = [counts(url) for url in urls]
    with router(urls, route, log_path) as front:
        wait_for_workers(front.url)
        record = hold_chats(front.url, replace(plan, headers=route.headers))
    done = [counts(url).since(was) for url, was in zip(urls, before, strict=True)]
    return done, record


def play_alone(server: ServerProcess, plan: Plan) -> tuple[list[dict[str, int]], Record]:
    """As ``play``, with one server and no router."""
    before = counts(server.url)
    record = hold_chats(server.url, replace(plan, headers=Route(()).headers))
    return [counts(server.url).since(before)], record


def play_with_kill(
    servers: Sequence[ServerProcess],
    start: Callable[[int], ServerProcess],
    plan: Plan,
    log_path: Path,
) -> tuple[Record, float]:
    """The chats, while the first server is killed after a third of the turns and started again.

    Args:
        start: Starts a server at this port.

    Returns:
        What the chats saw, and the seconds until the router had both servers again.
    """
    route, killed, seconds = ROUTES["session"], servers[0], 0.0
    with ExitStack() as stack:
        front = stack.enter_context(router([one.url for one in servers], route, log_path))
        wait_for_workers(front.url)

        def kill_and_start() -> None:
            nonlocal seconds
            began_s = time.monotonic()
            os.kill(killed.pid, signal.SIGKILL)
            killed.stop()
            stack.enter_context(start(killed.port))
            wait_for_workers(front.url)
            seconds = time.monotonic() - began_s

        thread = threading.Thread(target=kill_and_start, daemon=True)

        def on_answer(num_answered: int) -> None:
            if num_answered == plan.num_requests // 3:
                thread.start()

        record = hold_chats(front.url, replace(plan, headers=route.headers), on_answer)
        thread.join()
    return record, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    add_plan_flags(parser)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="[%(default)s]")
    options = parser.parse_args()
    silence_progress_bars()
    folder: Path = options.dir.resolve()
    checkpoint = make_checkpoint(folder / "checkpoint")
    adapters = make_adapters(checkpoint, folder / "adapters", demo_adapters(options.adapters))
    plan = Plan(list(adapters), options.sessions, options.turns)
    with replica(checkpoint, adapters, folder / "one.log", NUM_REPLICAS) as server:
        rows: list[tuple[str, list[dict[str, int]], Record]]
        rows = [("one server", *play_alone(server, plan))]
    with ExitStack() as stack:

        def start(number: int, port: int | None = None) -> ServerProcess:
            log_path = folder / f"replica-{number}.log"
            return replica(checkpoint, adapters, log_path, port=port)

        servers = [stack.enter_context(start(i + 1)) for i in range(NUM_REPLICAS)]
        urls = [server.url for server in servers]
        for name in options.routes:
            log_path = folder / f"router-{name}.log"
            rows.append((name, *play(urls, ROUTES[name], plan, log_path)))
        for url in urls:
            empty(url, plan.adapters)
        record, seconds = play_with_kill(
            servers, lambda port: start(0, port), plan, folder / "router-kill.log"
        )
        rows.append(("session, one killed", [], record))
    show(rows)
    Console().print(f"Both replicas were there again {seconds:.0f} s after one was killed.")


def show(rows: Sequence[tuple[str, Sequence[Mapping[str, int]], Record]]) -> None:
    """The table. All answers are compared with those of the first row."""
    table = Table("routing", box=SIMPLE)
    for column in (
        "requests",
        "adapters",
        "loads",
        "cached",
        "mean TTFT",
        "p95",
        "failed",
        "different",
    ):
        table.add_column(column, justify="right")
    for name, done, record in rows:
        table.add_row(
            name,
            *(
                " + ".join(str(did[what]) for did in done)
                for what in ("requests", "adapters", "adapter_loads")
            ),
            f"{record.cached_share:.1%}",
            f"{statistics.mean(record.ttft_s):.3f} s",
            f"{statistics.quantiles(record.ttft_s, n=20)[-1]:.3f} s",
            str(len(record.failures)),
            str(record.num_different(rows[0][2])),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
