"""Tables that set each side's figures with adapters over those of its own base-only traffic.

A latency depends on the engine (kernels, scheduler, HTTP server) and on the cache. With
``--base-only`` the same sessions are replayed without adapters, which shows the engine's part.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from sglang_elora.bench.figures import cell, medians
from sglang_elora.bench.plain_table import plain_table
from sglang_elora.bench.result import Result
from sglang_elora.workloads import BASE

METRICS = ("ttft_mean_ms", "ttft_p95_ms", "tpot_mean_ms", "e2e_mean_ms")
_Figures = Mapping[str, float | None]


def is_base(workload: str) -> bool:
    return workload.endswith(BASE)


def over_base(results: Sequence[Result]) -> list[str]:
    """A table for each workload and rate that was also replayed without adapters."""
    found = {(r.workload, r.turns_per_s, r.side, r.run): r.figures() for r in results}
    mixed = [key for key in found if (f"{key[0]}{BASE}", *key[1:]) in found]
    texts = []
    for workload, rate in dict.fromkeys(key[:2] for key in mixed):
        pairs: dict[str, list[tuple[_Figures, _Figures]]] = {}
        for key in mixed:
            if key[:2] == (workload, rate):
                pair = found[key], found[(f"{workload}{BASE}", *key[1:])]
                pairs.setdefault(key[2], []).append(pair)
        head = ["", "requests"]
        for name in METRICS:
            head += [name, "base only", "ratio"]
        table = plain_table([*head, "cached", "base only"], (_row(*item) for item in pairs.items()))
        texts.append(f"{workload} at {rate:g} turns/s, over base-only traffic\n{table}")
    return texts


def _row(side: str, pairs: Sequence[tuple[_Figures, _Figures]]) -> list[str]:
    mixed, base = (medians(column) for column in zip(*pairs, strict=True))
    row = [side, cell(mixed["requests"])]
    for name in METRICS:
        ratios = _known(_ratio(pair[0][name], pair[1][name]) for pair in pairs)
        row += [cell(mixed[name]), cell(base[name]), f"{ratios:.2f}" if ratios else "-"]
    return [*row, *(f"{_cached(side):.3f}" for side in (mixed, base))]


def _ratio(mixed: float | None, base: float | None) -> float | None:
    return mixed / base if mixed is not None and base else None


def _known(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None, or None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cached(figures: _Figures) -> float:
    return (figures["cached_device"] or 0) + (figures["cached_host"] or 0)
