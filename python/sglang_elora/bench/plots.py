"""Plots of results as PNG files, in the order of the report page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_elora.bench.figures import counted, medians
from sglang_elora.bench.record import PoolSample
from sglang_elora.bench.result import Result, by_block, by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLOURS = ("#8a9099", "#3b6ea5", "#4b9b6e", "#d98032", "#8a5aa8", "#b8474b", "#5fa8b5", "#a5893b")
_NAMES_THAT_FIT = 60  # letters of names below one axes
_INK = "#20242b"
_GRID = "#e3e5e8"
_USES = {
    "adapters": ("adapters", "#4b9b6e"),
    "kv_of_adapters": ("cached KV of adapters", "#3b6ea5"),
    "kv_of_base": ("cached KV of the base model", "#8a5aa8"),
    "running": ("held by running requests", "#d98032"),
}
"""Keys of a sample's ``uses``, from the bottom up; other slots are free, or stock's cache."""

Rows = Mapping[str, float | None]
Draw = Callable[["Axes", Sequence[Result], Mapping[str, str]], None]
"""Function that draws one block of results on one axes, with a colour per side."""


def save_plots(results: Sequence[Result], folder: Path) -> dict[str, Path]:
    """Write all plots that the results have data for; returns files by title. Needs no display."""
    names = sorted({result.side for result in results}, key=_stock_first)
    colours = {side: COLOURS[i % len(COLOURS)] for i, side in enumerate(names)}
    blocks, busiest = by_block(results), _busiest(results)
    saved = {}
    for stem, title, panels, draw in (
        ("latency", "Time to first token", blocks, _latency),
        ("cdf", "Requests that had their first token by then", blocks, _distribution),
        ("hits", "Where the prompts' tokens came from", blocks, _hits),
        ("invalid_kv", "Cached KV whose adapter is not on the device", busiest, _invalid_kv),
    ):
        path = folder / f"{stem}.png"
        _save(path, [(name, block, draw) for name, block in panels.items()], colours)
        saved[title] = path
    if len(blocks) > len(busiest):
        path = folder / "rates.png"
        panels = {
            name: [result for result in results if result.workload == name]
            for name in dict.fromkeys(result.workload for result in results)
        }
        _save(path, [(name, block, _rates) for name, block in panels.items()], colours)
        saved["Mean time to first token over the request rate"] = path
    composed = [
        (f"{name}, {side}", [next(iter(by_run.values()))], _composition)
        for name, block in busiest.items()
        for side, by_run in by_side(block).items()
        if next(iter(by_run.values())).pool
    ]
    if composed:
        _save(folder / "pool.png", composed, colours)
        saved["What the pool holds"] = folder / "pool.png"
    return saved


def _stock_first(side: str) -> tuple[bool, str]:
    return side.startswith("elora"), side


def _busiest(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The block of the highest rate of each workload."""
    found: dict[str, tuple[float, str, list[Result]]] = {}
    for name, block in by_block(results).items():
        workload, rate = block[0].workload, block[0].turns_per_s
        if workload not in found or rate > found[workload][0]:
            found[workload] = (rate, name, block)
    return {name: block for _, name, block in found.values()}


def _save(
    path: Path,
    panels: Sequence[tuple[str, Sequence[Result], Draw]],
    colours: Mapping[str, str],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (max(4.6 * columns, 6.0), 3.5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, block, draw) in zip(grid.flat, panels, strict=False):
        axes.set_title(title, loc="left", fontsize=10, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
        draw(axes, block, colours)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _medians(block: Sequence[Result]) -> dict[str, Rows]:
    return {
        side: medians([result.figures() for result in by_run.values()])
        for side, by_run in by_side(block).items()
    }


def _latency(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    columns = {"mean": "ttft_mean_ms", "P95": "ttft_p95_ms", "P99": "ttft_p99_ms"}
    rows = _medians(block)
    width = 0.8 / len(rows)
    for i, (side, row) in enumerate(rows.items()):
        places = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(columns))]
        heights = [row[column] or 0.0 for column in columns.values()]
        axes.bar(places, heights, width=0.92 * width, color=colours[side], label=side)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=7, frameon=False)


def _distribution(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    for side, by_run in by_side(block).items():
        mine = [r for result in by_run.values() for r in counted(result.records, result.warm_up_s)]
        times = sorted(1e3 * r.ttft_s for r in mine if r.error is None and r.ttft_s is not None)
        shares = [(i + 1) / len(mine) for i in range(len(times))]
        axes.plot(times, shares, color=colours[side], label=side, drawstyle="steps-post")
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("milliseconds")
    axes.set_ylim(0, 1.01)
    axes.legend(fontsize=7, frameon=False)


def _hits(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    rows = _medians(block)
    device = [row["cached_device"] or 0.0 for row in rows.values()]
    host = [row["cached_host"] or 0.0 for row in rows.values()]
    places = range(len(rows))
    axes.bar(places, device, width=0.6, color="#3b6ea5", label="device")
    axes.bar(places, host, width=0.6, bottom=device, color="#9dbbd8", label="host")
    long = max(map(len, rows)) * len(rows) > _NAMES_THAT_FIT
    turned = {"rotation": 20, "ha": "right"} if long else {}
    axes.set_xticks(places, list(rows), fontsize=7, **turned)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(fontsize=7, frameon=False)


def _rates(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    for side in dict.fromkeys(result.side for result in block):
        by_rate: dict[float, list[Result]] = {}
        for result in block:
            if result.side == side:
                by_rate.setdefault(result.turns_per_s, []).append(result)
        rows = {rate: medians([r.figures() for r in by_rate[rate]]) for rate in sorted(by_rate)}
        means = [row["ttft_mean_ms"] or 0.0 for row in rows.values()]
        tails = [row["ttft_p95_ms"] or 0.0 for row in rows.values()]
        axes.plot(list(rows), means, "o-", color=colours[side], label=side)
        axes.plot(list(rows), tails, "o--", color=colours[side], alpha=0.5, markersize=3)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("turns per second (dashed: P95)")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=7, frameon=False)


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _invalid_kv(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    silent = []
    for side, by_run in by_side(block).items():
        known = [
            (sample.at_s, sample.invalid_kv / sample.kv if sample.kv else 0.0)
            for sample in next(iter(by_run.values())).pool
            if sample.kv is not None and sample.invalid_kv is not None
        ]
        if known:
            axes.plot(*zip(*known, strict=True), color=colours[side], label=side)
        else:
            silent.append(side)
    axes.set_ylim(-0.02, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("seconds")
    if silent:
        text = "does not say: " + ", ".join(silent)
        axes.text(0.02, 0.9, text, transform=axes.transAxes, fontsize=7, color=_INK)
    if len(silent) < len(by_side(block)):
        axes.legend(fontsize=7, frameon=False, loc="center left")


def _composition(axes: Axes, block: Sequence[Result], colours: Mapping[str, str]) -> None:
    pool: Sequence[PoolSample] = block[0].pool
    times = [sample.at_s for sample in pool]
    told = {use: look for use, look in _USES.items() if any(use in s.uses for s in pool)}
    shares = [[sample.uses.get(use, 0) / sample.slots for sample in pool] for use in told]
    names, shades = zip(*told.values(), strict=True)
    axes.stackplot(times, shares, labels=names, colors=shades)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("seconds")
    axes.legend(fontsize=7, framealpha=0.85, edgecolor="none", loc="upper right")
