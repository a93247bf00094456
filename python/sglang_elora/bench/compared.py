"""Which sides of a workload are compared with which: ours with stock's, splits by their best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_elora.bench.figures import medians
from sglang_elora.bench.intervals import Ratio, Runs, ratios
from sglang_elora.bench.result import Result, by_side
from sglang_elora.bench.side_names import DEFAULT, ELORA, suffix
from sglang_elora.bench.side_names import TUNED as _TUNED

TUNED = f"{_TUNED}:"
BEST = "best static split"
_ORDER = (DEFAULT, f"{DEFAULT}+hicache", BEST, f"{BEST}+grouped", f"{BEST}+grouped+overlap")

ByRun = Mapping[int, Result]
Comparison = Mapping[tuple[str, str], Mapping[str, Ratio]]
"""Ratios by (side of ours, label of stock's system)."""


def is_ours(side: str) -> bool:
    return side.startswith(ELORA)


def best_splits(runs: Mapping[str, ByRun]) -> dict[str, str]:
    """The best static split of each suffix of options and threads, by its label.

    That is the stock-tuned side with the lowest mean TTFT among those of the suffix with most runs.
    The label is ``best static split`` and the suffix.
    """
    found: dict[str, str] = {}
    for ending in dict.fromkeys(suffix(side) for side in runs if side.startswith(TUNED)):
        splits = {
            side: by_run
            for side, by_run in runs.items()
            if side.startswith(TUNED) and suffix(side) == ending
        }
        most = max(map(len, splits.values()))
        means = {
            side: medians([result.figures() for result in by_run.values()])["ttft_mean_ms"]
            for side, by_run in splits.items()
            if len(by_run) == most
        }
        known = {side: mean for side, mean in means.items() if mean is not None}
        if known:
            found[f"{BEST}{ending}"] = min(known, key=known.__getitem__)
    return found


def at_edge(best: str, runs: Mapping[str, ByRun]) -> bool:
    """Whether a best split has the fewest or the most slots of several that were tried with its
    options, so that a better one may lie beyond."""
    tried = sorted(
        int(side.removeprefix(TUNED).removesuffix(suffix(side)))
        for side in runs
        if side.startswith(TUNED) and suffix(side) == suffix(best)
    )
    own = int(best.removeprefix(TUNED).removesuffix(suffix(best)))
    return len(tried) > 1 and own in (tried[0], tried[-1])


def systems(runs: Mapping[str, ByRun]) -> dict[str, str]:
    """Sides of one workload by label: stock's, of splits the best, in the order of the main table;
    then ours."""
    stocks = {side: side for side in runs if not side.startswith((ELORA, TUNED))}
    labelled = {**stocks, **best_splits(runs)}

    def place(label: str) -> tuple[int, str]:
        plain = label.partition("@")[0]
        return (_ORDER.index(plain) if plain in _ORDER else len(_ORDER), label)

    ordered = {label: labelled[label] for label in sorted(labelled, key=place)}
    return {**ordered, **{side: side for side in runs if is_ours(side)}}


def records_of(by_run: ByRun) -> Runs:
    return {run: result.records for run, result in by_run.items()}


def compared(results: Sequence[Result]) -> Comparison:
    """For one workload, the ratios of each ELORA side to each of stock's systems, by label."""
    runs = by_side(results)
    labelled = systems(runs)
    warm_up_s = max(result.warm_up_s for result in results)
    return {
        (ours, label): ratios(records_of(runs[ours]), records_of(runs[side]), warm_up_s)
        for ours in filter(is_ours, runs)
        for label, side in labelled.items()
        if not is_ours(side)
    }


def extent(results: Sequence[Result]) -> str:
    """How much was measured: "5 seeds x 300 s"."""
    num_seeds = len({result.run for result in results})
    return f"{num_seeds} seed{'s' * (num_seeds != 1)} x {results[0].duration_s:.0f} s"
