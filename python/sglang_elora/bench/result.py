"""Results of runs, read from their files."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_elora.bench.figures import BARS, Bars, figures, warm_up_s
from sglang_elora.bench.machine import is_dirty
from sglang_elora.bench.peak import peak_factor
from sglang_elora.bench.record import PoolSample, Record
from sglang_elora.workloads import Rise


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one trace on one side."""

    workload: str
    side: str
    run: int
    duration_s: float
    records: tuple[Record, ...]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    turns_per_s: float = 0.0  # of the trace
    pool: tuple[PoolSample, ...] = ()
    bars: Bars = BARS
    warm_up_s: float = 0.0  # requests that were due before it are not counted

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Result:
        duration_s = row["trace"]["duration_s"]
        return cls(
            workload=row["trace"]["workload"]["name"],
            side=row["side"],
            run=row["run"],
            duration_s=duration_s,
            records=tuple(map(Record.from_row, row["records"])),
            before=row["elora_before"],
            after=row["elora_after"],
            turns_per_s=row["trace"]["turns_per_s"],
            pool=tuple(PoolSample(**sample) for sample in row.get("pool", ())),
            bars=Bars(**row.get("bars", {})),
            warm_up_s=row.get("warm_up_s", warm_up_s(duration_s)),
        )

    def figures(self) -> dict[str, float | None]:
        times = (self.warm_up_s, self.duration_s)
        return figures(self.records, *times, self.before, self.after, self.bars)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of all run files in the folder, including gzipped ones."""
    plain = (path.read_bytes() for path in sorted(folder.glob("*.json")))
    packed = (gzip.decompress(path.read_bytes()) for path in sorted(folder.glob("*.json.gz")))
    rows = map(json.loads, itertools.chain(plain, packed))
    return [row for row in rows if "records" in row]


def provenance(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where rows come from: commits, machines and times, and what is unfit for publication."""

    def told(name: str) -> list[str]:
        return sorted({str(row.get(name) or "unknown") for row in rows})

    begun = [text for text in told("begun_at") if text != "unknown"]
    commits, hosts = told("commit"), told("host")
    foreign = [
        row
        for row in rows
        if (found := row.get("link")) and found.get("calibrated_on", "") != row.get("host", "")
    ]
    faults = [
        *(["rows of several commits"] if len(commits) > 1 else []),
        *(["rows of several machines"] if len(hosts) > 1 else []),
        *(["rows of a tree with uncommitted changes"] if any(map(is_dirty, commits)) else []),
        *([f"{len(foreign)} rows with another machine's link"] if foreign else []),
    ]
    times = f", begun {begun[0]} to {begun[-1]}" if begun else ""
    line = f"commit {', '.join(commits)}; machine {', '.join(hosts)} ({', '.join(told('cpu'))})"
    return f"{line}{times}" + (f"\nNOT FOR RESULTS: {'; '.join(faults)}" if faults else "")


def peak_of(row: Mapping[str, Any]) -> float | None:
    """The rate factor up to which mean TTFT stays below the bar."""
    records = Result.from_row(row).records
    ttft = [(r.due_s, math.inf if r.ttft_s is None else r.ttft_s) for r in records]
    return peak_factor(ttft, Rise(**row["rise"]), row["bar_ms"] / 1e3)


def by_block(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Comparable results: by workload, and by rate if a workload has several."""
    rates: dict[str, set[float]] = {}
    for result in results:
        rates.setdefault(result.workload, set()).add(result.turns_per_s)
    blocks: dict[str, list[Result]] = {}
    for result in results:
        name = result.workload
        if len(rates[name]) > 1:
            name = f"{name} at {result.turns_per_s:g} turns/s"
        blocks.setdefault(name, []).append(result)
    return blocks


def by_side(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """The results of one block by side and run."""
    runs: dict[str, dict[int, Result]] = {}
    for result in results:
        runs.setdefault(result.side, {})[result.run] = result
    return runs
