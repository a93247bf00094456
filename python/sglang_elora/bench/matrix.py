"""Runs of the same traces on stock SGLang and ELORA, with equal bytes on device and host.

A server is started for each (run, workload, side), or for each (run, side) to save time. A server
replays its traces in sequence, each from an empty cache; the servers of a run replay a trace in
turns of a few seconds (``turns``), in an order that turns around and rotates from run to run. One
file per trace has the records of all requests and samples of the pool.

A matrix that was interrupted continues: rows that lie in the folder already are not measured again
if they are of the same commit, machine, versions, trace, flags and link.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.bench.driver import Manner
from sglang_elora.bench.figures import BARS, Bars, warm_up_s
from sglang_elora.bench.machine import commit, is_dirty, machine, now
from sglang_elora.bench.record import Played, Record
from sglang_elora.bench.servers import Bench
from sglang_elora.bench.sides import Side
from sglang_elora.bench.turns import Replay, play_in_turns
from sglang_elora.testbed.server import ServerProcess
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
    num_together: int = 6  # servers that run at the same time, in turns
    slice_s: float = 10.0  # seconds of a turn
    allow_dirty: bool = False  # measure a tree with uncommitted changes
    allow_other_link: bool = False  # use a link that was calibrated on another machine
    base_only: bool = False  # after each trace, its sessions once more without adapters

    def traces(self, workloads: Sequence[str], number: int) -> list[tuple[float, Trace]]:
        """(load, trace) pairs of the workloads, by increasing load within a workload."""
        found: list[tuple[float, Trace]] = []
        for workload in workloads:
            for load in sorted(self.loads):
                trace = make_trace(
                    replace(WORKLOADS[workload], num_adapters=self.num_adapters),
                    turns_per_s=load * TURNS_PER_S[workload],
                    duration_s=self.duration_s,
                    seed=number,
                )
                found.append((load, trace))
                if self.base_only:
                    found.append((load, trace.without_adapters()))
        return found

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
    """Runs a plan and writes its rows to ``out``.

    Raises:
        ValueError: The tree has uncommitted changes, or the link is another machine's, and the
            plan does not allow it.
    """

    def __init__(self, bench: Bench, plan: Plan, out: Path, watcher: Watcher) -> None:
        self._bench = bench
        self._plan = plan
        self._out = out
        self._watcher = watcher
        self._facts = {**machine(), **bench.facts(), "bars": asdict(plan.bars)}
        if not plan.allow_dirty:
            refuse_dirty(self._facts["commit"])
        if bench.link is not None and bench.link.host != self._facts["host"]:
            if not plan.allow_other_link:
                raise ValueError(
                    f"the link was calibrated on machine {bench.link.host or 'unknown'}, this is "
                    f"{self._facts['host']}: calibrate it here (--link measure), or "
                    "--allow-other-link"
                )

    def play(self) -> list[Row]:
        """All rows, in the order in which they were measured.

        Raises:
            ValueError: A named side does not exist, or does not fit.
        """
        rows: list[Row] = []
        for number in self._plan.numbers:
            for workloads in self._plan.groups:
                traces = self._plan.traces(workloads, number)
                sides = in_turn(self._feasible([trace for _, trace in traces]), number)
                for group in _groups(sides, self._plan.num_together):
                    rows += self._play(group, traces, number)
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

    def _play(
        self, sides: Sequence[Side], traces: Sequence[tuple[float, Trace]], number: int
    ) -> list[Row]:
        """The rows of sides that take turns, side by side; those on disk are not measured again."""
        rows: dict[tuple[str, int], Row] = {}
        for side in sides:
            for i, (load, trace) in enumerate(traces):
                row = self._on_disk(side, load, trace, number)
                if row is not None:
                    rows[side.name, i] = row
        with ExitStack() as stack:
            servers = {
                side.name: self._start(side, traces, number, stack)
                for side in sides
                if any((side.name, i) not in rows for i in range(len(traces)))
            }
            for i, (load, trace) in enumerate(traces):
                left = [side for side in sides if (side.name, i) not in rows]
                found = self._replay(left, servers, load, trace, number) if left else []
                rows.update({(row["side"], i): row for row in found})
        for _ in sides:
            self._watcher.ended()
        return [rows[side.name, i] for side in sides for i in range(len(traces))]

    def _start(
        self, side: Side, traces: Sequence[tuple[float, Trace]], number: int, stack: ExitStack
    ) -> ServerProcess:
        """The side's server, started and then suspended until its turn."""
        self._watcher.starts(f"{side.name}: starting its server")
        first = self._stem(side, *traces[0], number)
        server = stack.enter_context(self._bench.server(side, self._out / "logs" / f"{first}.log"))
        server.suspend()
        return server

    def _replay(
        self,
        sides: Sequence[Side],
        servers: Mapping[str, ServerProcess],
        load: float,
        trace: Trace,
        number: int,
    ) -> list[Row]:
        """Replay a trace on the servers of the sides, in turns, and write the rows."""
        if not self._plan.allow_dirty and commit() != self._facts["commit"]:
            raise ValueError(
                f"the tree changed from {self._facts['commit']} to {commit()} during the "
                "runs: measure in a checkout that nobody changes, or --allow-dirty"
            )
        names = [side.name for side in sides]
        self._watcher.starts(f"{trace.workload.name} {number}, load {load:g}: {', '.join(names)}")
        for side in sides:
            _empty(servers[side.name], side.flush)
        begun_at, played_trace = now(), self._played(trace)
        played = play_in_turns(
            [Replay(servers[side.name], played_trace, self._manner(side)) for side in sides],
            self._plan.slice_s,
        )
        rows = [
            {
                **self._identity(side, load, trace, number),
                "when": self._facts["when"],
                "begun_at": begun_at,
                "in_turns": names,
                "slice_s": self._plan.slice_s,
                **measured(one),
            }
            for side, one in zip(sides, played, strict=True)
        ]
        for side, row in zip(sides, rows, strict=True):
            _write(self._path(side, load, trace, number), row)
        return rows

    def _on_disk(self, side: Side, load: float, trace: Trace, number: int) -> Row | None:
        """The row from an earlier call, if its file is there and the row would be the same."""
        path = self._path(side, load, trace, number)
        if is_dirty(self._facts["commit"]) or not path.exists():
            return None
        row: Row = json.loads(path.read_text())
        same = json.loads(json.dumps(self._identity(side, load, trace, number)))
        return row if all(row.get(name) == value for name, value in same.items()) else None

    def _identity(self, side: Side, load: float, trace: Trace, number: int) -> Row:
        """What a row is of; rows that are equal in it need not be measured twice."""
        facts = {name: value for name, value in self._facts.items() if name != "when"}
        played = self._played(trace)
        return {
            **facts,
            "side": side.name,
            "flags": side.flags,
            "settings": self._bench.settings(side),
            "run": number,
            "load": load,
            "trace": {**played.facts(), "mean_live_kv_tokens": played.mean_live_kv_tokens},
            "warm_up_s": warm_up_s(played.duration_s, played.mean_life_s),
            **self._rise(trace),
        }

    def _played(self, trace: Trace) -> Trace:
        rise = self._plan.rise
        return trace if rise is None else trace.rising(*rise)

    def _rise(self, trace: Trace) -> Row:
        if self._plan.rise is None:
            return {}
        rise = Rise(*self._plan.rise, trace.duration_s)
        return {"rise": asdict(rise), "bar_ms": self._plan.bars.ttft_ms}

    def _path(self, side: Side, load: float, trace: Trace, number: int) -> Path:
        return self._out / f"{self._stem(side, load, trace, number)}.json"

    def _stem(self, side: Side, load: float, trace: Trace, number: int) -> str:
        """The stem of a row's file name."""
        peak = "" if self._plan.rise is None else "peak-"
        at = "" if len(self._plan.loads) == 1 else f"-load-{load:g}"
        return f"{peak}{trace.workload.name}-{side.name.replace(':', '_')}-{number}{at}"

    def _manner(self, side: Side) -> Manner:
        return Manner(
            side.open,
            names_sessions=side.names_sessions,
            sample_s=SAMPLE_S,
            on_record=self._watcher.answered,
        )


def measured(played: Played) -> Row:
    """What a row says of a replay."""
    return {
        "wall_s": played.wall_s,
        "elora_before": played.before,
        "elora_after": played.after,
        "pool": [asdict(sample) for sample in played.pool],
        "records": [asdict(record) for record in played.records],
    }


def refuse_dirty(found: str) -> None:
    """Raise ValueError if the commit is of a tree with uncommitted changes."""
    if is_dirty(found):
        raise ValueError(
            f"the tree has uncommitted changes ({found}), so its rows would be of no commit: "
            "commit them, or --allow-dirty for rows that are not for publication"
        )


def in_turn(sides: list[Side], number: int) -> list[Side]:
    """The sides in the order of run ``number``: odd runs turn it around, and it rotates by one
    every two runs, so that no side always follows the same one or is always first."""
    first = (number // 2) % len(sides)
    turned = [*sides[first:], *sides[:first]]
    return turned[::-1] if number % 2 else turned


def _write(path: Path, row: Row) -> None:
    """Write a row's file, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row) + "\n")
    part.replace(path)


def _groups(sides: Sequence[Side], size: int) -> Iterator[Sequence[Side]]:
    """The sides in groups of at most ``size``, as even as possible."""
    num_groups = -(-len(sides) // size)
    for i in range(num_groups):
        yield sides[i * len(sides) // num_groups : (i + 1) * len(sides) // num_groups]


def _empty(server: ServerProcess, path: str) -> None:
    """Empty the cache of a suspended server."""
    server.resume()
    answer = httpx.post(f"{server.url}{path}", timeout=60, trust_env=False)
    answer.raise_for_status()
    if '"success":false' in answer.text:  # vLLM's answer while blocks are in use
        raise RuntimeError(f"{server.url} did not empty the cache: {answer.text}")
    server.suspend()
