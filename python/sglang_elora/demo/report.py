"""Tables of a demo run for the terminal."""

from __future__ import annotations

from statistics import fmean

from rich import box
from rich.table import Table
from rich.text import Text

from sglang_elora.demo.summary import DemoRun, cached_share

_NOT_REPORTED = "—"


def turn_table(run: DemoRun) -> Table:
    """Latency and reuse by turn: later turns find their history in the cache."""
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
    """Who was served, and how often each adapter had to be brought onto the device."""
    table = _table("By adapter")
    table.add_column("adapter")
    table.add_column("rank", justify="right")
    table.add_column("alpha", justify="right")
    table.add_column("targets")
    table.add_column("requests", justify="right")
    table.add_column("loads", justify="right")
    table.add_column("mean TTFT", justify="right")
    table.add_column("cached", justify="right")
    for summary in run.by_adapter():
        spec, loads, ttft_s = summary.spec, summary.num_loads, summary.mean_ttft_s
        table.add_row(
            spec.name,
            str(spec.rank),
            str(spec.alpha),
            spec.coverage,
            str(summary.num_requests),
            _NOT_REPORTED if loads is None else str(loads),
            _NOT_REPORTED if ttft_s is None else milliseconds(ttft_s),
            f"{summary.cached_share:.0%}",
        )
    table.columns[0].footer = "all"
    table.columns[4].footer = str(len(run.records))
    table.columns[5].footer = _NOT_REPORTED if run.loads is None else str(sum(run.loads.values()))
    table.columns[6].footer = milliseconds(fmean(record.ttft_s for record in run.records))
    table.columns[7].footer = f"{cached_share(run.records):.0%}"
    table.show_footer = True
    return table


def milliseconds(seconds: float) -> str:
    """A duration for a table cell."""
    return f"{seconds * 1000:,.0f} ms"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _bar(fraction: float, width: int = 20) -> Text:
    return Text("━" * round(fraction * width), style="dark_orange")
