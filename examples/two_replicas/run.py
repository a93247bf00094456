"""Two replicas behind SGLang's router: sessions stay where their adapter and KV are, or do not.

    pip install 'sglang-elora[demo,router]'
    python examples/two_replicas/run.py

The same chats are held once for each way of routing. Before each, both replicas are emptied.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sglang_elora.control.connections import LIMITS
from sglang_elora.demo.__main__ import MODEL, launch_flags
from sglang_elora.demo.chat import system_prompt, user_message
from sglang_elora.testbed.adapters import demo_adapters, make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import ServerProcess, free_port, python_module

NUM_REPLICAS = 2
POOL_SLOTS = 8000  # of a replica: about half of the adapters beside their KV
ROUTING_KEY = "X-SMG-Routing-Key"  # the header that the router's policy "manual" goes by
SESSION, SESSION_END = "X-Request-Id-Session", "X-Request-Id-Session-End"  # read by the replicas
MEAN_THINK_S = 2.0
NUM_TOKENS = 16  # of an answer


@dataclass(frozen=True, slots=True)
class Route:
    """The router's policy, and the key that a request with this session and adapter carries."""

    flags: tuple[str, ...]
    key: Callable[[str, str], str] | None = None


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


def replica(checkpoint: Path, adapters: Mapping[str, Path], log_path: Path) -> ServerProcess:
    flags = ("--max-total-tokens", str(POOL_SLOTS), "--enable-metrics")
    command = launch_flags(checkpoint, adapters, flags)
    return ServerProcess(command, log_path=log_path)


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


async def hold_chats(
    url: str, route: Route, adapters: Sequence[str], num_sessions: int, num_turns: int
) -> list[float]:
    """Seconds that each turn took. A session keeps its adapter."""
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=LIMITS) as http:

        async def hold(number: int) -> None:
            adapter, session = adapters[number % len(adapters)], f"session-{number}"
            headers = {SESSION: session}
            if route.key is not None:
                headers[ROUTING_KEY] = route.key(session, adapter)
            messages: list[dict[str, Any]] = [{"role": "system", "content": system_prompt(adapter)}]
            thinking = random.Random(number)
            for turn in range(num_turns):
                await asyncio.sleep(MEAN_THINK_S * min(3.0, thinking.expovariate(1.0)))
                messages.append({"role": "user", "content": user_message(number, turn)})
                if turn + 1 == num_turns:
                    headers[SESSION_END] = "true"
                body = {
                    "model": f"{MODEL}:{adapter}",
                    "messages": messages,
                    "max_tokens": NUM_TOKENS,
                    "temperature": 0,
                }
                sent_s = time.perf_counter()
                answer = await http.post("/v1/chat/completions", json=body, headers=headers)
                answer.raise_for_status()
                seconds.append(time.perf_counter() - sent_s)
                messages.append(answer.json()["choices"][0]["message"])

        await asyncio.gather(*map(hold, range(num_sessions)))
    return seconds


def play(
    urls: Sequence[str],
    route: Route,
    adapters: Sequence[str],
    num_sessions: int,
    num_turns: int,
    log_path: Path,
) -> tuple[list[dict[str, int]], float]:
    """What each of these replicas did, empty before, and the mean seconds of a turn."""
    for url in urls:
        empty(url, adapters)
    before = [counts(url) for url in urls]
    with router(urls, route, log_path) as front:
        wait_for_workers(front.url)
        seconds = asyncio.run(hold_chats(front.url, route, adapters, num_sessions, num_turns))
    done = [counts(url).since(was) for url, was in zip(urls, before, strict=True)]
    return done, statistics.mean(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="[%(default)s]")
    options = parser.parse_args()
    silence_progress_bars()
    folder: Path = options.dir.resolve()
    checkpoint = make_checkpoint(folder / "checkpoint")
    adapters = make_adapters(checkpoint, folder / "adapters", demo_adapters(options.adapters))
    table = Table(
        "routing", "replica", box=SIMPLE, title=f"{options.sessions} chats of {options.turns} turns"
    )
    for column in ("requests", "adapters", "loads", "prompt", "cached", "turn"):
        table.add_column(column, justify="right")
    with ExitStack() as servers:
        urls = [
            servers.enter_context(
                replica(checkpoint, adapters, folder / f"replica-{i + 1}.log")
            ).url
            for i in range(NUM_REPLICAS)
        ]
        for name in options.routes:
            log_path = folder / f"router-{name}.log"
            plan = (list(adapters), options.sessions, options.turns)
            done, mean_s = play(urls, ROUTES[name], *plan, log_path)
            for i, did in enumerate(done):
                is_first, is_last = i == 0, i + 1 == len(done)
                table.add_row(
                    name if is_first else "",
                    str(i + 1),
                    *(str(did[n]) for n in ("requests", "adapters", "adapter_loads")),
                    str(did["prompt_tokens"]),
                    f"{did['cached_tokens'] / max(1, did['prompt_tokens']):.1%}",
                    f"{mean_s:.3f} s" if is_first else "",
                    end_section=is_last,
                )
    Console().print(table)


if __name__ == "__main__":
    main()
