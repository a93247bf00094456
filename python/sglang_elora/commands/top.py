"""``sglang-elora top``: what a running server keeps on the device, live in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

State = Mapping[str, Any]
"""What ``GET /elora/state`` answers."""

TIERS = {
    "device": "green",
    "loading": "yellow",
    "host": "blue",
    "reading": "magenta",
    "disk": "dim",
}
_USES = {
    "adapters": ("adapters", "green"),
    "kv_of_adapters": ("KV of adapters", "cyan"),
    "kv_of_base": ("KV of the base model", "magenta"),
    "running": ("running", "red"),
}
"""Parts of ``pool["uses"]``, and how they are shown; what is left is free."""

_RATES = ("adapter_loads", "adapter_evictions", "adapter_churn", "kv_slots_evicted")
_SWAPS_SHOWN = 8


def moves(before: State | None, after: State) -> Iterator[str]:
    """Adapters whose weights are elsewhere than before."""
    if before is None:
        return
    was = {row["lora_id"]: row["tier"] for row in before["adapters"]}
    for row in after["adapters"]:
        tier = was.get(row["lora_id"])
        if tier is not None and tier != row["tier"]:
            yield f"{row['lora_name']}: {tier} -> {row['tier']}"


def pool_bar(pool: Mapping[str, Any], width: int) -> Text:
    """The pool as one line, a colour per use and dots for what is free."""
    line, total = Text(), 0
    for use, (name, colour) in _USES.items():
        total += pool["uses"][use]
        line.append(name[0] * (round(total / pool["slots"] * width) - len(line)), style=colour)
    return line.append("." * (width - len(line)))


def shares(counts: Mapping[str, int], whole: str) -> dict[str, float]:
    """Parts of a count as shares of it; none while it is 0."""
    parts = {name: count for name, count in counts.items() if name.startswith(f"{whole}.")}
    total = sum(parts.values())
    return {name.partition(".")[2]: part / total for name, part in parts.items() if part}


def hit_rates(counts: Mapping[str, int]) -> str:
    """Where requests have found their adapters, and the tokens of their prompts."""
    return ";  ".join(
        f"{title} found: {', '.join(f'{part} {share:.0%}' for part, share in found.items())}"
        for title, whole in (("adapters", "adapter_lookups"), ("prompts", "prompt_tokens"))
        if (found := shares(counts, whole))
    )


def screen(
    state: State, before: State | None, swaps: Sequence[str], *, width: int, height: int
) -> RenderableType:
    """
    Args:
        before: The state one refresh ago, for what happened since.
        swaps: The last ones, newest last.
        width: Of the terminal, in characters.
        height: As many adapters are listed as fit.
    """
    pool, counts = state["pool"], state["pool"]["counts"]
    earlier = counts if before is None else before["pool"]["counts"]
    tiers = Counter(row["tier"] for row in state["adapters"])
    head = [
        Text(
            f"{pool['slots']} slots, {pool['free']} free; requests: {pool['num_running']} running, "
            f"{pool['num_waiting']} waiting"
        ),
        pool_bar(pool, width),
        _listed((name, pool["uses"][use], colour) for use, (name, colour) in _USES.items()),
        _listed((tier, tiers[tier], colour) for tier, colour in TIERS.items()),
        Text(hit_rates(counts)),
        Text(
            ", ".join(
                f"{n.replace('_', ' ')} {counts[n]} (+{counts[n] - earlier[n]})" for n in _RATES
            )
        ),
    ]
    shown = list(swaps)[-_SWAPS_SHOWN:]
    num_rows = max(1, height - len(head) - len(shown) - 4)
    return Group(*head, _adapters(state["adapters"], num_rows), *map(Text, shown))


def _listed(values: Iterable[tuple[str, int, str]]) -> Text:
    """(name, value, colour) each."""
    return Text("  ").join(Text(f"{name} {value}", style=colour) for name, value, colour in values)


def _adapters(rows: Sequence[Mapping[str, Any]], most: int) -> Table:
    table = Table("adapter", "tier", box=None, padding=(0, 2, 0, 0))
    for name in ("slots", "KV", "KV on host", "runs", "idle"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=_importance)[:most]:
        idle = "-" if row["idle_s"] is None else f"{row['idle_s']:.0f} s"
        numbers = ("slots", "kv_tokens_device", "kv_tokens_host", "visits")
        table.add_row(
            Text(row["lora_name"] + (" (pinned)" if row["pinned"] else "")),
            Text(row["tier"], style=TIERS[row["tier"]]),
            *(str(row[name]) for name in numbers),
            idle,
        )
    return table


def _importance(row: Mapping[str, Any]) -> tuple[int, float]:
    idle_s = row["idle_s"]
    return list(TIERS).index(row["tier"]), float("inf") if idle_s is None else idle_s


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
    before, swaps = None, deque[str](maxlen=_SWAPS_SHOWN)
    with (
        httpx.Client(base_url=options.url, headers=headers, timeout=10) as http,
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
