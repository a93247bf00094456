"""Polling of the demo server's cache state during the chats, with moves of adapters."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from rich.console import Console, RenderableType
from rich.text import Text

from sglang_elora.control.connections import LIMITS
from sglang_elora.control.screen import SWAPS_SHOWN, State, moves, screen

INTERVAL_S = 0.5
"""Seconds between polls. Raising it misses more moves and takes less server time."""

_TIMEOUT_S = 30.0


class CacheWatch:
    """Polls ``GET /elora/state`` in its own thread while ``running``.

    An adapter that is loaded and evicted between two polls is missing in ``moves``, but included in
    the server's counts. ``state``, ``before`` and ``moves`` are set only by that thread.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.state: State | None = None
        self.before: State | None = None
        self.moves: deque[str] = deque(maxlen=SWAPS_SHOWN)
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Iterator[CacheWatch]:
        """Poll while the body runs, and once after it, so that the counts are final."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            thread.join()

    def counts(self) -> Mapping[str, int]:
        """The server's counts since its start; empty if it never answered."""
        return {} if self.state is None else self.state["pool"]["counts"]

    @property
    def pool_slots(self) -> int:
        """Slots of the pool; 0 if the server never answered."""
        return 0 if self.state is None else int(self.state["pool"]["slots"])

    def screen(self, console: Console, lines_taken: int) -> RenderableType:
        """The screen of ``sglang-elora top``, sized for the terminal's remaining lines."""
        state, height = self.state, console.height - lines_taken
        if state is None:
            return Text("waiting for the server's state", style="dim")
        return screen(
            state, self.before, list(self.moves), width=console.width, height=max(8, height)
        )

    def numbers(self) -> str:
        """The counts in one line; empty before the first answer."""
        counts = self.counts()
        if not counts:
            return ""
        return (
            f"loads {counts['adapter_loads']} · evictions {counts['adapter_evictions']} · "
            f"adapter hits {counts['adapter_lookups.device']}"
        )

    def _watch(self) -> None:
        with httpx.Client(
            base_url=self._url, timeout=_TIMEOUT_S, trust_env=False, limits=LIMITS
        ) as http:
            last = False
            while not last:
                last = self._stopped.wait(INTERVAL_S)
                state = _ask(http)
                if state is None:
                    continue
                for move in moves(self.state, state):
                    self.moves.append(f"{time.strftime('%X')} {move}")
                self.before, self.state = self.state, state


def _ask(http: httpx.Client) -> dict[str, Any] | None:
    """The state, or None if the server is busy or down, which the chats report."""
    try:
        answer = http.get("/elora/state")
        answer.raise_for_status()
    except httpx.HTTPError:
        return None
    state: dict[str, Any] = answer.json()
    return state
