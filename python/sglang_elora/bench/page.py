"""Report as one self-contained HTML file, with tables, plots and the conditions of measurement."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sglang_elora.bench.compared import Comparison, compared, extent, systems
from sglang_elora.bench.figures import COLUMNS, cell, medians
from sglang_elora.bench.main_table import main_table
from sglang_elora.bench.result import Result, by_block, by_side

Facts = Mapping[str, Any]
_COLUMNS = {
    "requests": "requests that were due after the warm-up (a session's mean life, at least 20% and "
    "at most 50% of the trace)",
    "goodput": "share of them under both bars",
    "cached_device, cached_host": "shares of the prompts' tokens, by where they were found",
    "adapter_loads": "of the whole run; stock does not count them",
    "late_p99_ms": "how long after it was due the client sent a request",
}


@dataclass(frozen=True, slots=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class _Block:
    """One workload at one rate; ``ratios`` is None if there is nothing to compare."""

    name: str
    figures: _Table
    ratios: _Table | None


def page(title: str, results: Sequence[Result], facts: Facts, plots: Mapping[str, Path]) -> str:
    """The report as HTML, from ``page.html.j2``.

    Args:
        facts: Facts of the first row: machine, versions, sizes.
        plots: PNG files by title.
    """
    templates = Environment(
        loader=PackageLoader("sglang_elora.bench", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    blocks = by_block(results)
    comparisons = {name: compared(block) for name, block in blocks.items()}
    silent = [r.side for r in results if not any(s.invalid_kv is not None for s in r.pool)]
    return templates.get_template("page.html.j2").render(
        title=title,
        sides=list(dict.fromkeys(result.side for result in results)),
        num_runs=len({result.run for result in results}),
        duration_s=results[0].duration_s,
        how=_how(facts),
        main=main_table(blocks, comparisons),
        blocks=[
            _Block(name, _figures(block), _ratios(block, comparisons[name]))
            for name, block in blocks.items()
        ],
        plots={name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()},
        facts=_flat(facts),
        columns=_COLUMNS,
        silent=list(dict.fromkeys(silent)),
    )


def _how(facts: Facts) -> str:
    if where := facts.get("url"):
        return f"one server that was already running, {where}"
    link = "with an emulated host-to-device link" if facts.get("link") else "without a link's delay"
    return f"servers of equal device bytes on the same traces, {link}"


def _figures(block: Sequence[Result]) -> _Table:
    rows = {
        side: medians([result.figures() for result in by_run.values()])
        for side, by_run in by_side(block).items()
    }
    head = ["side", *(name.replace("_", " ") for name in COLUMNS)]
    return _Table(head, [[s, *(cell(row[name]) for name in COLUMNS)] for s, row in rows.items()])


def _ratios(block: Sequence[Result], found: Comparison) -> _Table | None:
    columns = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    if not columns:
        return None
    sides = systems(by_side(block))
    rows = [
        [f"{ours} / {other if sides[other] == other else f'{other} ({sides[other]})'}"]
        + [ratios[name].with_runs if name in ratios else "-" for name in columns]
        for (ours, other), ratios in found.items()
    ]
    head = f"ratio [95% interval over sessions], {extent(block)}"
    return _Table([head, *(c.replace("_", " ") for c in columns)], rows)


def _flat(facts: Facts) -> list[list[str]]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}: {key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return [[name, str(value)] for name, value in flat.items()]
