"""Replay of the traces on one running server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sglang_elora.bench.driver import Manner, play
from sglang_elora.bench.endpoint import Api, Endpoint, find
from sglang_elora.bench.figures import warm_up_s
from sglang_elora.bench.machine import machine, now
from sglang_elora.bench.matrix import SAMPLE_S, Plan, Row, Watcher, measured
from sglang_elora.workloads import Trace


def play_running(
    where: tuple[str, Api, str | None, Sequence[str] | None],
    plan: Plan,
    out: Path,
    watcher: Watcher,
) -> list[Row]:
    """All rows; each is also written to a file.

    Args:
        where: URL, API, model and adapters: the arguments of ``endpoint.find``.

    Raises:
        EndpointError: The server cannot be reached, or not measured with these options.
    """
    endpoint = find(*where)
    watcher.starts(f"trying out {endpoint.model} with {len(endpoint.adapters)} adapters")
    endpoint.try_out()
    facts = {
        **machine(),
        "url": endpoint.url,
        "api": endpoint.api,
        "model": endpoint.model,
        "num_adapters": len(endpoint.adapters),
        "bars": asdict(plan.bars),
    }
    rows: list[Row] = []
    for number in plan.numbers:
        for workload in plan.workloads:
            for load, trace in plan.traces([workload], number):
                watcher.starts(f"{workload} {number}, load {load:g}")
                row = {**facts, **_row(endpoint, trace, number, watcher), "load": load}
                path = out / f"{workload}-{endpoint.api}-{number}-load-{load:g}.json"
                path.write_text(json.dumps(row) + "\n")
                rows.append(row)
            watcher.ended()
    return rows


def _row(endpoint: Endpoint, trace: Trace, number: int, watcher: Watcher) -> Row:
    begun_at = now()
    manner = Manner(endpoint.open, sample_s=SAMPLE_S, on_record=watcher.answered)
    played = play(endpoint.url, endpoint.assigned(trace), manner)
    return {
        "side": f"{endpoint.model} ({endpoint.api})",
        "run": number,
        "begun_at": begun_at,
        "trace": trace.facts(),
        "warm_up_s": warm_up_s(trace.duration_s, trace.mean_life_s),
        **measured(played),
    }
