# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal and a plot for the eye."""

from __future__ import annotations

import random
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from sglang_elora.demo.summary import DemoRun, cached_share, share

_NOT_REPORTED = "—"
_TTFT_COLOUR = "#3b6ea5"
_CACHE_COLOUR = "#d98032"
_QUIET = "#8a8f98"


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
    table.columns[7].footer = f"{cached_share(run.records):.0%}"
    table.show_footer = True
    return table


def save_plot(run: DemoRun, path: Path) -> None:
    """Two panels by turn: time to first token, and the share of the prompt that was cached.

    Writes a PNG; needs no display. Each dot is a request, drawn with a fixed jitter.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    turns = [summary.turn for summary in run.by_turn()]
    labels = [str(turn + 1) for turn in turns]
    per_turn = [[record for record in run.records if record.turn == turn] for turn in turns]
    figure, (latency, reuse) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    sessions = len({record.session for record in run.records})
    figure.suptitle(
        f"{sessions} concurrent chats over {len(run.specs)} LoRA adapters on one base model",
        fontsize=13,
    )
    jitter = random.Random(0)
    for turn, records in zip(turns, per_turn, strict=True):
        places = [turn + jitter.uniform(-0.17, 0.17) for _ in records]
        dots = {"s": 13, "alpha": 0.55, "linewidths": 0, "zorder": 3}
        latency.scatter(
            places, [record.ttft_s * 1000 for record in records], color=_TTFT_COLOUR, **dots
        )
        reuse.scatter(
            places,
            [share(record.cached_tokens, record.prompt_tokens) for record in records],
            color=_QUIET,
            **dots,
        )
    ink = {"color": "#20242b", "linewidth": 1.2}
    latency.boxplot(
        [[record.ttft_s * 1000 for record in records] for records in per_turn],
        positions=turns,
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#3b6ea522", "edgecolor": _TTFT_COLOUR},
        medianprops=ink,
        whiskerprops={"color": _TTFT_COLOUR},
        capprops={"color": _TTFT_COLOUR},
    )
    shares = [summary.cached_share for summary in run.by_turn()]
    bars = reuse.bar(turns, shares, width=0.5, color=_CACHE_COLOUR, alpha=0.75, zorder=2)
    reuse.bar_label(bars, [f"{value:.0%}" for value in shares], label_type="center", color="white")
    latency.set(title="Time to first token", ylabel="milliseconds", xlabel="turn")
    latency.set_ylim(bottom=0)
    reuse.set(title="Prompt tokens found in the cache", xlabel="turn", ylim=(0, 1))
    reuse.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (latency, reuse):
        axes.set_xticks(turns, labels)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e5e8", zorder=0)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def milliseconds(seconds: float) -> str:
    """A duration for a table cell."""
    return f"{seconds * 1000:,.0f} ms"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _bar(fraction: float, width: int = 20) -> Text:
    full = round(fraction * width)
    return Text("━" * full, style="dark_orange") + Text("━" * (width - full), style="grey30")
