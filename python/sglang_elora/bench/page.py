"""A report in one HTML file: tables, pictures, how it was measured. Nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sglang_elora.bench.figures import COLUMNS, cell, medians
from sglang_elora.bench.report import BEST, best_split, compared
from sglang_elora.bench.result import Result, by_block, by_side

Facts = Mapping[str, Any]
_PNG = "data:image/png;base64,"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #20242b; max-width: 74em; margin: 2em auto;
  padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 1.5em }
th, td { padding: .2em .7em; border-bottom: 1px solid #e3e5e8; text-align: right }
th:first-child, td:first-child { text-align: left }
th { font-weight: 600; background: #f5f6f7 }
img { max-width: 100% }
"""
_COLUMNS = {
    "requests": "answers to requests that were due after the warm-up (20% of the trace)",
    "goodput": "share of them under both bars",
    "cached_device, cached_host": "shares of the prompts' tokens, by where they were found",
    "adapter_loads": "of the whole run; stock does not count them",
    "late_p99_ms": "how long after it was due the client sent a request",
}


def page(title: str, results: Sequence[Result], facts: Facts, plots: Mapping[str, Path]) -> str:
    """
    Args:
        facts: Of the first row: machine, versions, sizes.
        plots: PNG files by title.
    """
    parts = [f"<h1>{escape(title)}</h1>", _sentence(results, facts)]
    for name, block in by_block(results).items():
        parts += [f"<h2>{escape(name)}</h2>", _figures(block), _ratios(block)]
    for name, path in plots.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h2>{escape(name)}</h2>\n<img alt='{escape(name)}' src='{_PNG}{data}'>")
    parts += ["<h2>How it was measured</h2>", _facts(facts), _notes(results)]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def _sentence(results: Sequence[Result], facts: Facts) -> str:
    sides = ", ".join(dict.fromkeys(result.side for result in results))
    runs = len({result.run for result in results})
    seconds = results[0].duration_s
    link = "with an emulated host-to-device link" if facts.get("link") else "without a link's delay"
    where = facts.get("url")
    how = (
        f"one server that was already running, {where}"
        if where
        else f"servers of equal device bytes on the same traces, {link}"
    )
    return f"<p>{escape(sides)}: {runs} run(s) of {seconds:.0f} s each; {escape(how)}.</p>"


def _figures(block: Sequence[Result]) -> str:
    rows = {
        side: medians([result.figures() for result in by_run.values()])
        for side, by_run in by_side(block).items()
    }
    head = ["side", *(name.replace("_", " ") for name in COLUMNS)]
    cells = [[side, *(cell(row[name]) for name in COLUMNS)] for side, row in rows.items()]
    return _table(head, cells)


def _ratios(block: Sequence[Result]) -> str:
    found = compared(block)
    columns = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    if not columns:
        return ""
    best = best_split(by_side(block))
    rows = [
        [f"{ours} / {f'{BEST} ({best})' if other == BEST else other}"]
        + [str(ratios[name]) if name in ratios else "-" for name in columns]
        for (ours, other), ratios in found.items()
    ]
    return _table(["median ratio (range) over runs", *(c.replace("_", " ") for c in columns)], rows)


def _facts(facts: Facts) -> str:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}: {key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return _table(["", ""], [[name, str(value)] for name, value in flat.items()])


def _notes(results: Sequence[Result]) -> str:
    notes = [f"<b>{name}</b>: {text}." for name, text in _COLUMNS.items()]
    silent = [r.side for r in results if not any(s.invalid_kv is not None for s in r.pool)]
    if silent:
        sides = escape(", ".join(dict.fromkeys(silent)))
        notes.append(
            f"Not told by the servers of {sides}: what their caches hold, and whose it is, so that "
            "this is left out. A probe in the scheduler has measured stock's invalid KV: "
            "benchmarks/results/invalid_kv."
        )
    return "<ul>\n" + "\n".join(f"<li>{note}</li>" for note in notes) + "\n</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
