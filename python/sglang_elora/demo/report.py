"""Tables of a demo run for the terminal."""

from __future__ import annotations

from statistics import fmean

from rich import box
from rich.table import Table
from rich.text import Text

from sglang_elora.demo.slots import slot_demand
from sglang_elora.demo.summary import DemoRun, cached_share, share

_NOT_REPORTED = "—"


def turn_table(run: DemoRun) -> Table:
    """Latency and cache hits by turn; later turns find their history in the cache."""
    table = _table("By turn")
    table.add_column("turn", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("mean TTFT", justify="right")
    table.add_column("P95 TTFT", justify="right")
    table.add_column("prompt tokens", justify="right")
    table.add_column("cached tokens", justify="right")
    table.add_column("cached", justify="right")
    table.add_column("", min_width=20)
    for summary in run.by_turn():
        table.add_row(
            str(summary.turn + 1),
            str(summary.num_requests),
            milliseconds(summary.mean_ttft_s),
            milliseconds(summary.p95_ttft_s),
            f"{summary.prompt_tokens:,}",
            f"{summary.cached_tokens:,}",
            f"{summary.cached_share:.0%}",
            _bar(summary.cached_share),
        )
    return table


def adapter_table(run: DemoRun) -> Table:
    """Requests, loads and evictions of each adapter."""
    table = _table("By adapter")
    table.add_column("adapter")
    table.add_column("rank", justify="right")
    table.add_column("alpha", justify="right")
    table.add_column("targets")
    table.add_column("requests", justify="right")
    table.add_column("loads", justify="right")
    table.add_column("evictions", justify="right")
    table.add_column("mean TTFT", justify="right")
    table.add_column("cached", justify="right")
    for summary in run.by_adapter():
        spec, moves, ttft_s = summary.spec, summary.moves, summary.mean_ttft_s
        table.add_row(
            spec.name,
            str(spec.rank),
            str(spec.alpha),
            spec.coverage,
            str(summary.num_requests),
            _NOT_REPORTED if moves is None else str(moves.num_loads),
            _NOT_REPORTED if moves is None else str(moves.num_evictions),
            _NOT_REPORTED if ttft_s is None else milliseconds(ttft_s),
            f"{summary.cached_share:.0%}",
        )
    table.columns[0].footer = "all"
    table.columns[4].footer = str(len(run.records))
    if run.moves is not None:
        moved = run.moves.values()
        table.columns[5].footer = str(sum(moves.num_loads for moves in moved))
        table.columns[6].footer = str(sum(moves.num_evictions for moves in moved))
    table.columns[7].footer = milliseconds(fmean(record.ttft_s for record in run.records))
    table.columns[8].footer = f"{cached_share(run.records):.0%}"
    table.show_footer = True
    return table


def cache_table(run: DemoRun) -> Table:
    """The server's counts of adapter and KV cache events since its start."""
    table = _counts_table("What the cache did, as the server counted")
    counts = run.counts
    if not counts:
        table.add_row("the server told no counts", _NOT_REPORTED)
        return table
    lookups = sum(count for name, count in counts.items() if name.startswith("adapter_lookups."))
    prompts = sum(count for name, count in counts.items() if name.startswith("prompt_tokens."))
    hits, kv_hits = counts["adapter_lookups.device"], prompts - counts["prompt_tokens.computed"]
    rows = {
        "adapter loads": f"{counts['adapter_loads']:,}",
        "adapter evictions": f"{counts['adapter_evictions']:,}",
        "adapter hits: requests that found theirs on the device": _of(hits, lookups),
        "KV hits: prompt tokens found in the cache": _of(kv_hits, prompts),
        "KV evicted, in tokens": f"{counts['kv_slots_evicted']:,}",
        "KV offloaded to the host, in tokens": f"{counts['kv_slots_to_host']:,}",
        "KV loaded back from the host, in tokens": f"{counts['kv_slots_from_host']:,}",
        "adapters announced before their request ran": f"{counts['hints_used']:,}",
    }
    if prefetched := counts["prefetched_slots"]:
        used = _of(counts["prefetched_slots_used"], prefetched)
        rows["prefetched while the pool had room, in slots: used"] = used
    if run.moves is not None:
        needed = sum(moves.num_slots for moves in run.moves.values())
        table.add_row("slots of the pool (one holds a token's KV)", f"{run.pool_slots:,}")
        table.add_row("slots that the adapters need together, without KV", f"{needed:,}")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def slot_table(run: DemoRun) -> Table:
    """Waiting of the same turns on a server with a fixed number of adapter slots, computed."""
    demand = slot_demand(run.records)
    table = _counts_table(
        f"With {demand.num_slots} fixed adapter slots (SGLang's default): "
        "computed from the recorded turns, not measured"
    )
    table.add_row("most adapters in flight at one time", str(demand.most_adapters))
    table.add_row(
        f"turns that would have had to wait, {demand.num_slots} other adapters being in flight",
        _of(demand.num_over, demand.num_turns),
    )
    table.add_row("turns that would have been refused", "0 (SGLang lets them wait)")
    return table


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds, formatted for a table cell."""
    return f"{seconds * 1000:,.0f} ms"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _bar(fraction: float, width: int = 20) -> Text:
    return Text("━" * round(fraction * width), style="dark_orange")


def _counts_table(title: str) -> Table:
    table = _table(title)
    table.show_header = False
    table.add_column("")
    table.add_column("", justify="right")
    return table


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({share(part, whole):.0%})"
