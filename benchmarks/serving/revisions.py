"""Two checkouts of this project on the same traces, in turns: did a change cost anything?

    python -m benchmarks.serving.revisions --before DIR --after DIR --out FILE [--kinds KIND ...]

DIR is a checkout (``git worktree add --detach DIR COMMIT``) with the same dependencies as this
environment. Kinds: ``base`` has no requests with adapters, ``one`` all with the same adapter,
``mixed`` the workload as it is. The table has the ratio after / before of each figure with its
95% interval.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from benchmarks.serving.one_trace import NUM_ADAPTERS, add_flags, link_of, trace_of  # noqa: E402
from sglang_elora.bench.figures import figures, warm_up_s  # noqa: E402
from sglang_elora.bench.intervals import ratios  # noqa: E402
from sglang_elora.bench.machine import commit, machine  # noqa: E402
from sglang_elora.bench.plain_table import plain_table  # noqa: E402
from sglang_elora.bench.servers import Bench  # noqa: E402
from sglang_elora.bench.sides import Sizes  # noqa: E402
from sglang_elora.bench.turns import Replay, play_in_turns  # noqa: E402
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
    add_flags(parser)
    options = parser.parse_args()
    trace = trace_of(options)
    checkouts = [options.before.resolve(), options.after.resolve()]
    path, rows, table = os.environ.get("PYTHONPATH", ""), [], []
    with tempfile.TemporaryDirectory(prefix="revisions-") as name, ExitStack() as stack:
        bench = Bench(Path(name), NUM_ADAPTERS, Sizes(), link_of(options))
        servers = []
        for i, checkout in enumerate(checkouts):
            os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout / "python"), path])
            server = bench.server(bench.side(SIDE, trace), Path(name) / f"{i}.log")
            servers.append(stack.enter_context(server))
            server.suspend()
        for kind in options.kinds:
            mine = KINDS[kind](trace)
            played = play_in_turns([Replay(server, mine) for server in servers], SLICE_S)
            counted_from = warm_up_s(options.duration)
            before, after = ({0: found.records} for found in played)
            found = ratios(after, before, counted_from)
            table.append([kind, *(str(found[name]) for name in FIGURES)])
            rows += [
                {
                    **machine(),
                    **bench.facts(),
                    "trace": mine.facts(),
                    "kind": kind,
                    "revision": commit(checkout),
                    "figures": figures(one.records, counted_from, options.duration),
                    "records": [asdict(record) for record in one.records],
                }
                for checkout, one in zip(checkouts, played, strict=True)
            ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(" -> ".join(map(commit, checkouts)))
    print(plain_table(["after / before", *FIGURES], table))


if __name__ == "__main__":
    main()
