"""A server's state as rich renderables, for ``sglang-elora top`` and the demo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

State = Mapping[str, Any]
"""The JSON answer of ``GET /elora/state``."""

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
"""Keys of ``pool["uses"]``, with title and colour; the remaining slots are free."""

_RATES = ("adapter_loads", "adapter_evictions", "adapter_churn", "kv_slots_evicted")
SWAPS_SHOWN = 8


def moves(before: State | None, after: State) -> Iterator[str]:
    """One text per adapter whose tier differs between the two states."""
    if before is None:
        return
    was = {row["lora_id"]: row["tier"] for row in before["adapters"]}
    for row in after["adapters"]:
        tier = was.get(row["lora_id"])
        if tier is not None and tier != row["tier"]:
            yield f"{row['lora_name']}: {tier} -> {row['tier']}"


def pool_bar(pool: Mapping[str, Any], width: int) -> Text:
    """The pool as one line, with a colour per use and dots for free slots."""
    line, total = Text(), 0
    for use, (name, colour) in _USES.items():
        total += pool["uses"][use]
        line.append(name[0] * (round(total / pool["slots"] * width) - len(line)), style=colour)
    return line.append("." * (width - len(line)))


def shares(counts: Mapping[str, int], whole: str) -> dict[str, float]:
    """Each label value's share of a labelled counter, without zeros."""
    parts = {name: count for name, count in counts.items() if name.startswith(f"{whole}.")}
    total = sum(parts.values())
    return {name.partition(".")[2]: part / total for name, part in parts.items() if part}


def hit_rates(counts: Mapping[str, int]) -> str:
    """Hit rates as one line: shares of adapter lookups and of prompt tokens, by tier."""
    return ";  ".join(
        f"{title} found: {', '.join(f'{part} {share:.0%}' for part, share in found.items())}"
        for title, whole in (("adapters", "adapter_lookups"), ("prompts", "prompt_tokens"))
        if (found := shares(counts, whole))
    )


def screen(
    state: State, before: State | None, swaps: Sequence[str], *, width: int, height: int
) -> RenderableType:
    """The whole screen: pool, counters, adapters and recent moves.

    Args:
        before: The state one refresh ago, to show differences of counters.
        swaps: Texts of ``moves``, newest last.
        width: Of the terminal, in characters.
        height: Of the terminal, in lines; adapters that do not fit are omitted.
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
    shown = list(swaps)[-SWAPS_SHOWN:]
    num_rows = max(1, height - len(head) - len(shown) - 4)
    return Group(*head, _adapters(state["adapters"], num_rows), *map(Text, shown))


def _listed(values: Iterable[tuple[str, int, str]]) -> Text:
    """One line of ``name value`` items, from (name, value, colour) each."""
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
