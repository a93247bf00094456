"""``sglang-elora top``: live view of a running server's pool and adapters in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence

import httpx
from rich.live import Live

from sglang_elora.control.connections import LIMITS
from sglang_elora.control.screen import SWAPS_SHOWN, moves, screen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sglang-elora top", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--api-key", help="the server's --admin-api-key, where it has one")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between refreshes")
    parser.add_argument("--once", action="store_true", help="print one screen and end")
    options = parser.parse_args(argv)
    if not options.interval > 0:
        parser.error(f"--interval must be positive, got {options.interval}")
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    before, swaps = None, deque[str](maxlen=SWAPS_SHOWN)
    with (
        httpx.Client(base_url=options.url, headers=headers, timeout=10, limits=LIMITS) as http,
        Live(screen=not options.once, auto_refresh=False) as live,
    ):
        while True:
            try:
                answer = http.get("/elora/state")
                answer.raise_for_status()
            except httpx.HTTPError as error:
                live.stop()
                print(f"{options.url}: {error}", file=sys.stderr)
                return 1
            state = answer.json()
            swaps.extend(f"{time.strftime('%X')} {move}" for move in moves(before, state))
            size = live.console.size
            live.update(
                screen(state, before, swaps, width=size.width, height=size.height), refresh=True
            )
            if options.once:
                return 0
            before = state
            try:
                time.sleep(options.interval)
            except KeyboardInterrupt:
                return 0
