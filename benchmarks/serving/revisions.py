"""Two checkouts of this project on the same traces, in turns: did a change cost anything?

    python -m benchmarks.serving.revisions --before DIR --after DIR --out FILE [--kinds KIND ...]
        [--starts N]

DIR is a checkout (``git worktree add --detach DIR COMMIT``) with the same dependencies as this
environment. Kinds: ``base`` has no requests with adapters, ``one`` all with the same adapter,
``mixed`` the workload as it is. The table has the ratio after / before of each figure with its
95% interval, and that of the processor time of the servers' processes.

Two servers of one commit may differ by 10% for as long as they run. ``--starts`` repeats
everything with servers started anew, in the other order.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from benchmarks.serving.one_trace import NUM_ADAPTERS, add_flags, link_of, trace_of  # noqa: E402
from sglang_elora.bench.figures import figures, warm_up_s  # noqa: E402
from sglang_elora.bench.intervals import ratios  # noqa: E402
from sglang_elora.bench.machine import commit, machine  # noqa: E402
from sglang_elora.bench.plain_table import plain_table  # noqa: E402
from sglang_elora.bench.record import Record  # noqa: E402
from sglang_elora.bench.servers import Bench  # noqa: E402
from sglang_elora.bench.sides import Sizes  # noqa: E402
from sglang_elora.bench.turns import Replay, play_in_turns  # noqa: E402
from sglang_elora.testbed.process_tree import ProcessTree  # noqa: E402
from sglang_elora.testbed.server import ServerProcess  # noqa: E402
from sglang_elora.workloads import Trace  # noqa: E402

SIDE, SLICE_S = "elora:elora", 10.0
FIGURES = ("ttft_mean_ms", "ttft_p95_ms", "tpot_mean_ms", "e2e_mean_ms")


def _one_adapter(trace: Trace) -> Trace:
    names = sorted({session.adapter for session in trace.sessions} - {""})
    sessions = tuple(replace(session, adapter=names[0]) for session in trace.sessions)
    return replace(trace, sessions=sessions)


KINDS: Mapping[str, Callable[[Trace], Trace]] = {
    "base": Trace.without_adapters,
    "one": _one_adapter,
    "mixed": lambda trace: trace,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--starts", type=int, default=1)
    add_flags(parser)
    options = parser.parse_args()
    trace = trace_of(options)
    checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
    rows: list[dict[str, Any]] = []
    records: dict[tuple[str, str], dict[int, Sequence[Record]]] = {}  # by kind and side; by start
    with tempfile.TemporaryDirectory(prefix="revisions-") as name:
        bench = Bench(Path(name), NUM_ADAPTERS, Sizes(), link_of(options))
        for start in range(options.starts):
            order = list(checkouts) if start % 2 == 0 else list(checkouts)[::-1]
            sides = [(side, checkouts[side]) for side in order]
            for row, found in _one_start(bench, Path(name), options, trace, sides):
                rows.append({**row, "start": start})
                records.setdefault((row["kind"], row["side"]), {})[start] = found
                options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = []
    for kind in options.kinds:
        after, before = records[kind, "after"], records[kind, "before"]
        compared = ratios(after, before, warm_up_s(options.duration))
        cpu_s = {
            side: sum(sum(row["cpu_s"].values()) for row in rows if _is_of(row, kind, side))
            for side in checkouts
        }
        times = f"{cpu_s['after'] / cpu_s['before']:.3f}"
        table.append([kind, *(compared[name].with_runs for name in FIGURES), times])
    print(" -> ".join(map(commit, checkouts.values())))
    print(plain_table(["after / before", *FIGURES, "processor time"], table))


def _one_start(
    bench: Bench,
    folder: Path,
    options: Namespace,
    trace: Trace,
    checkouts: Sequence[tuple[str, Path]],
) -> Iterator[tuple[dict[str, Any], Sequence[Record]]]:
    """A row and the records per kind and server, with servers started for them."""
    path = os.environ.get("PYTHONPATH", "")
    with ExitStack() as stack:
        servers = []
        for side, checkout in checkouts:
            os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout / "python"), path])
            server = bench.server(bench.side(SIDE, trace), folder / f"{side}.log")
            servers.append(stack.enter_context(server))
            os.environ["PYTHONPATH"] = path
            server.suspend()
        for kind in options.kinds:
            mine = KINDS[kind](trace)
            begin = [_cpu_s(server) for server in servers]
            played = play_in_turns([Replay(server, mine) for server in servers], SLICE_S)
            for i, (side, checkout) in enumerate(checkouts):
                counted_from = warm_up_s(options.duration)
                yield (
                    {
                        **machine(),
                        **bench.facts(),
                        "trace": mine.facts(),
                        "kind": kind,
                        "side": side,
                        "revision": commit(checkout),
                        "figures": figures(played[i].records, counted_from, options.duration),
                        "cpu_s": _difference(begin[i], _cpu_s(servers[i])),
                        "records": [asdict(record) for record in played[i].records],
                    },
                    played[i].records,
                )


def _is_of(row: Mapping[str, Any], kind: str, side: str) -> bool:
    return bool(row["kind"] == kind and row["side"] == side)


def _cpu_s(server: ServerProcess) -> dict[str, float]:
    """Processor seconds of each of the server's processes until now, by its title."""
    tree = ProcessTree(server.pid)
    tree.collect()
    return {
        f"{Path(each.cmdline()[0]).name} {each.pid}": sum(each.cpu_times()[:2])
        for each in tree.alive()
    }


def _difference(begin: Mapping[str, float], end: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value - begin.get(name, 0.0), 2) for name, value in end.items()}


if __name__ == "__main__":
    main()
