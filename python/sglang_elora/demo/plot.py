"""Plot of a demo run: latency and cache hits by turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_elora.demo.summary import DemoRun, cached_share, share
from sglang_elora.demo.turns import TurnRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#20242b"
_BLUE = "#3b6ea5"
_PALE_BLUE = "#dbe5f0"
_ORANGE = "#d98032"
_PALE_ORANGE = "#f3d9bf"
_GRID = "#e3e5e8"


def save_plot(run: DemoRun, path: Path) -> None:
    """Write a PNG with two panels: time to first token, and cached share of the prompt.

    Each dot is one request. Needs no display.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_turns = 1 + max(record.turn for record in run.records)
    turns = [[r for r in run.records if r.turn == turn] for turn in range(num_turns)]
    num_sessions = len({record.session for record in run.records})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(
        f"{num_sessions} concurrent chats, {len(run.specs)} LoRA adapters, one base model",
        fontsize=13,
        fontweight="bold",
        color=_INK,
    )
    _draw_latency(left, turns)
    _draw_reuse(right, turns)
    for axes in (left, right):
        axes.set_xticks(range(num_turns), [str(turn + 1) for turn in range(num_turns)])
        axes.set_xlim(-0.6, num_turns - 0.4)
        axes.set_xlabel("turn")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw_latency(axes: Axes, turns: Sequence[Sequence[TurnRecord]]) -> None:
    slowest_s = max(record.ttft_s for records in turns for record in records)
    unit, factor = ("seconds", 1.0) if slowest_s >= 2 else ("milliseconds", 1000.0)
    values = [[record.ttft_s * factor for record in records] for records in turns]
    axes.boxplot(
        values,
        positions=range(len(turns)),
        widths=0.6,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": _PALE_BLUE, "edgecolor": _BLUE},
        medianprops={"color": _INK, "linewidth": 1.6},
        whiskerprops={"color": _BLUE},
        capprops={"color": _BLUE},
    )
    _draw_dots(axes, values, _BLUE)
    axes.set_ylim(0, slowest_s * factor * 1.05)
    axes.set_ylabel(unit)
    axes.set_title("Time to first token", loc="left", fontsize=11)


def _draw_reuse(axes: Axes, turns: Sequence[Sequence[TurnRecord]]) -> None:
    means = [cached_share(records) for records in turns]
    axes.bar(range(len(turns)), means, width=0.6, color=_PALE_ORANGE, edgecolor=_ORANGE)
    for turn, mean in enumerate(means):
        axes.annotate(
            f"{mean:.0%}",
            (turn, max(mean / 2, 0.05)),
            ha="center",
            va="center",
            color=_INK,
            fontweight="bold",
        )
    values = [[share(r.cached_tokens, r.prompt_tokens) for r in records] for records in turns]
    _draw_dots(axes, values, _ORANGE)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Prompt tokens found in the cache", loc="left", fontsize=11)


def _draw_dots(axes: Axes, values: Sequence[Sequence[float]], colour: str) -> None:
    """Draw one dot per value, with horizontal jitter so that equal values stay visible."""
    jitter = random.Random(0)
    for turn, column in enumerate(values):
        places = [turn + jitter.uniform(-0.2, 0.2) for _ in column]
        axes.scatter(places, column, s=14, alpha=0.6, linewidths=0, color=colour, zorder=3)
