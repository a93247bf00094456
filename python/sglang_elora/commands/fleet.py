"""``sglang-elora fleet``: place the adapters of several servers, by load, through their endpoints.

Each round reads ``/elora/state`` of all servers and orders prefetches, pins with a lease, and
evictions. Ending it, at any time, changes nothing on the servers but that pins run out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from sglang_elora.control.connections import LIMITS
from sglang_elora.fleet import Controller, Order

_TIMEOUT_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run rounds until interrupted, or ``--rounds`` of them. Returns 1 if no server answered."""
    options = parsed(argv)
    try:
        return asyncio.run(_run(options))
    except KeyboardInterrupt:
        return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the command; ends the process if they are wrong."""
    parser = argparse.ArgumentParser(prog="sglang-elora fleet", description=__doc__)
    add = parser.add_argument
    add("--url", action="append", required=True, help="of a server; once for each")
    add("--api-key", help="the servers' --admin-api-key, where they have one")
    add("--interval", type=float, default=5.0, help="seconds between rounds")
    add("--rounds", type=int, help="end after so many; without it, run until interrupted")
    add("--dry-run", action="store_true", help="print orders, and send none")
    options = parser.parse_args(argv)
    if not options.interval > 0:
        parser.error(f"--interval must be positive, got {options.interval}")
    options.url = list(dict.fromkeys(url.rstrip("/") for url in options.url))
    return options


async def _run(options: argparse.Namespace) -> int:
    urls: list[str] = options.url
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    controller = Controller(urls, time.monotonic())
    done = 0
    async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT_S, limits=LIMITS) as http:
        while True:
            states = dict(
                zip(urls, await asyncio.gather(*(_state(http, url) for url in urls)), strict=True)
            )
            if done == 0 and not any(states.values()):
                print("no server has answered", file=sys.stderr)
                return 1
            for order in controller.round(states, time.monotonic()):
                refused = "" if options.dry_run else await _send(http, order)
                print(f"{order}{refused}", flush=True)
            done += 1
            if options.rounds is not None and done >= options.rounds:
                return 0
            await asyncio.sleep(options.interval)


async def _state(http: httpx.AsyncClient, url: str) -> dict[str, Any] | None:
    """The server's state; None if it does not answer, or is not ready for new sessions."""
    try:
        ready = await http.get(f"{url}/ready")
        if ready.is_success:
            answer = await http.get(f"{url}/elora/state")
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found
        print(f"{url}: not ready", file=sys.stderr)
    except (httpx.HTTPError, ValueError) as error:
        print(f"{url}: {type(error).__name__}: {error}", file=sys.stderr)
    return None


async def _send(http: httpx.AsyncClient, order: Order) -> str:
    """Send an order; returns what to add to its line if it was refused."""
    try:
        answer = await http.post(f"{order.server}/elora/{order.what}", json=dict(order.body))
    except httpx.HTTPError as error:
        return f" ({type(error).__name__}: {error})"
    return "" if answer.is_success else f" (refused: {answer.text})"
