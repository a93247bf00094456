"""The main table: all systems as columns, and ours over each of them with an interval.

Figures are of all counted requests of all runs of a system. A ratio is over the requests that both
answered (``intervals``). The last columns of stock differ from ours only in the cache: their LoRA
costs the same, and their loads are concurrent with batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_elora.bench.compared import Comparison, extent, is_ours, systems
from sglang_elora.bench.figures import cell, figures
from sglang_elora.bench.plain_table import markdown_table, plain_table
from sglang_elora.bench.result import Result, by_side
from sglang_elora.bench.side_names import suffix

_FIGURES = {
    "ttft_mean_ms": "mean TTFT, ms",
    "ttft_p95_ms": "P95 TTFT, ms",
    "tpot_mean_ms": "TPOT, ms",
    "e2e_mean_ms": "mean latency to the last token, ms",
}
_NONE = "-"
_OURS = "elora:elora"


@dataclass(frozen=True, slots=True)
class MainTable:
    """``about`` says what is compared, and how much was measured."""

    about: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return f"{self.about}\n{plain_table(self.head, self.rows)}"

    @property
    def markdown(self) -> str:
        return f"{self.about}\n\n{markdown_table(self.head, self.rows)}"


def main_table(
    blocks: Mapping[str, Sequence[Result]], comparisons: Mapping[str, Comparison]
) -> MainTable | None:
    """The table of all workloads from ``compared`` of each; None without a side of ours or stock.

    Ours is ``elora:elora`` with the fewest options, or else the last side of ours.
    """
    results = [result for block in blocks.values() for result in block]
    candidates = list(dict.fromkeys(r.side for r in results if is_ours(r.side)))
    labels = dict.fromkeys(
        label
        for block in blocks.values()
        for label, side in systems(by_side(block)).items()
        if not is_ours(side)
    )
    if not candidates or not labels:
        return None
    own = [side for side in candidates if side.removesuffix(suffix(side)) == _OURS]
    ours = min(own, key=len) if own else candidates[-1]
    columns = [*labels, ours]
    rows = [
        row
        for name, block in blocks.items()
        for row in _rows(name, block, comparisons[name], columns, ours)
    ]
    about = f"ours is {ours}; ours / it [95% interval over sessions]; {extent(results)}"
    return MainTable(about, ["", *columns], rows)


def _rows(
    name: str, block: Sequence[Result], over: Comparison, columns: Sequence[str], ours: str
) -> list[list[str]]:
    runs = by_side(block)
    found = systems(runs)
    values = {label: _pooled(list(runs[side].values())) for label, side in found.items()}
    slots = [found[label] if found.get(label, label) != label else "" for label in columns]
    rows = [[f"{name}: split", *slots]] if any(slots) else []
    for figure, text in _FIGURES.items():
        absolute = [cell(values[c][figure]) if c in values else _NONE for c in columns]
        ratios = [str(over.get((ours, c), {}).get(figure, _NONE)) for c in columns]
        ratios[columns.index(ours)] = "1"
        rows += [[f"{name}: {text}", *absolute], [f"{name}: ours / it", *ratios]]
    return rows


def _pooled(results: Sequence[Result]) -> dict[str, float | None]:
    """Figures of the requests of all runs together."""
    first = results[0]
    records = [record for result in results for record in result.records]
    return figures(records, first.warm_up_s, first.duration_s)
