"""Runs of the same traces on stock SGLang and ELORA, with equal bytes on device and host.

A server is started for each (run, workload, side), or for each (run, side) to save time; the sides
of a run are measured one after the other, in an order that rotates from run to run. A server
replays its traces in sequence, each from an empty cache. One file per trace has the records of all
requests and samples of the pool.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.bench.driver import Manner, play
from sglang_elora.bench.figures import BARS, Bars
from sglang_elora.bench.machine import machine
from sglang_elora.bench.record import Record
from sglang_elora.bench.servers import Bench
from sglang_elora.bench.sides import Side
from sglang_elora.workloads import TURNS_PER_S, WORKLOADS, Rise, Trace, make_trace

SAMPLE_S = 0.5
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """Workloads, sides and parameters of a benchmark."""

    workloads: Sequence[str]
    sides: Sequence[str]
    swept_sides: Sequence[str] = ()  # skipped if their split leaves too little KV
    runs: int = 3
    loads: Sequence[float] = (1.0,)  # factors of workloads.TURNS_PER_S
    duration_s: float = 75.0
    seed: int = 0  # also the number of the first run
    num_adapters: int = 64
    bars: Bars = BARS
    rise: tuple[float, float] | None = None  # first and last rate factor
    shares_servers: bool = False  # one server replays all workloads

    def traces(self, workloads: Sequence[str], number: int) -> list[tuple[float, Trace]]:
        """(load, trace) pairs of the workloads, by increasing load within a workload."""
        return [
            (
                load,
                make_trace(
                    replace(WORKLOADS[workload], num_adapters=self.num_adapters),
                    turns_per_s=load * TURNS_PER_S[workload],
                    duration_s=self.duration_s,
                    seed=number,
                ),
            )
            for workload in workloads
            for load in sorted(self.loads)
        ]

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Groups of workloads that one server replays."""
        return [self.workloads] if self.shares_servers else [[name] for name in self.workloads]

    @property
    def numbers(self) -> range:
        """Numbers of the runs, which are also the seeds of their traces."""
        return range(self.seed, self.seed + self.runs)

    @property
    def num_servers(self) -> int:
        return self.runs * len(self.groups) * (len(self.sides) + len(self.swept_sides))


@dataclass(frozen=True, slots=True)
class Watcher:
    """Callbacks that report the progress of the matrix."""

    starts: Callable[[str], None]  # with a description of the next step
    answered: Callable[[Record], None]
    ended: Callable[[], None]  # after each server
    left_out: Callable[[str], None]  # with a skipped side and the reason

    @classmethod
    def plain(cls) -> Watcher:
        """A watcher that writes lines to stderr."""

        def write(what: str) -> None:
            print(what, file=sys.stderr, flush=True)

        return cls(write, lambda record: None, lambda: None, write)


class Matrix:
    """Runs a plan and writes its rows to ``out``."""

    def __init__(self, bench: Bench, plan: Plan, out: Path, watcher: Watcher) -> None:
        self._bench = bench
        self._plan = plan
        self._out = out
        self._watcher = watcher
        self._facts = {**machine(), **bench.facts(), "bars": asdict(plan.bars)}

    def play(self) -> list[Row]:
        """All rows, in the order in which they were measured.

        Raises:
            ValueError: A named side does not exist, or does not fit.
        """
        rows: list[Row] = []
        for number in self._plan.numbers:
            for workloads in self._plan.groups:
                traces = self._plan.traces(workloads, number)
                for side in rotated(self._feasible([trace for _, trace in traces]), number):
                    rows += self._play(side, traces, number)
                    self._watcher.ended()
        return rows

    def _feasible(self, traces: Sequence[Trace]) -> list[Side]:
        longest = max(traces, key=lambda trace: max(s.num_tokens for s in trace.sessions))
        sides = [self._bench.side(name, longest) for name in self._plan.sides]
        for name in self._plan.swept_sides:
            if name in self._plan.sides:
                continue
            try:
                sides.append(self._bench.side(name, longest))
            except ValueError as error:
                self._watcher.left_out(f"{name}: {error}")
        return sides

    def _play(self, side: Side, traces: Sequence[tuple[float, Trace]], number: int) -> list[Row]:
        rows: list[Row] = []
        first = self._stem(side, *traces[0], number)
        self._watcher.starts(f"{side.name}: starting its server")
        with self._bench.server(side, self._out / "logs" / f"{first}.log") as server:
            for load, trace in traces:
                if rows:
                    _empty(server.url)
                self._watcher.starts(f"{side.name}: {trace.workload.name} {number}, load {load:g}")
                row = {**self._facts, **self._row(server.url, side, trace, number), "load": load}
                path = self._out / f"{self._stem(side, load, trace, number)}.json"
                path.write_text(json.dumps(row) + "\n")
                rows.append(row)
        return rows

    def _stem(self, side: Side, load: float, trace: Trace, number: int) -> str:
        """The stem of a row's file name."""
        peak = "" if self._plan.rise is None else "peak-"
        at = "" if len(self._plan.loads) == 1 else f"-load-{load:g}"
        return f"{peak}{trace.workload.name}-{side.name.replace(':', '_')}-{number}{at}"

    def _row(self, url: str, side: Side, trace: Trace, number: int) -> Row:
        more: Row = {}
        if self._plan.rise is not None:
            rise = Rise(*self._plan.rise, trace.duration_s)
            trace = trace.rising(rise.low, rise.high)
            more = {"rise": asdict(rise), "bar_ms": self._plan.bars.ttft_ms}
        manner = Manner(
            names_sessions=side.names_sessions,
            sample_s=SAMPLE_S,
            on_record=self._watcher.answered,
        )
        played = play(url, trace, manner)
        return {
            "side": side.name,
            "flags": side.flags,
            "run": number,
            "trace": {**trace.facts(), "mean_live_kv_tokens": trace.mean_live_kv_tokens},
            "wall_s": played.wall_s,
            "elora_before": played.before,
            "elora_after": played.after,
            **more,
            "pool": [asdict(sample) for sample in played.pool],
            "records": [asdict(record) for record in played.records],
        }


def rotated(sides: list[Side], number: int) -> list[Side]:
    first = number % len(sides)
    return [*sides[first:], *sides[:first]]


def _empty(url: str) -> None:
    answer = httpx.post(f"{url}/flush_cache?timeout=30", timeout=60, trust_env=False)
    answer.raise_for_status()
