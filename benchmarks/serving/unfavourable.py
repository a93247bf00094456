"""Cases in which one pool gains little or nothing, where stock may be as good or better.

    python -m benchmarks.serving.unfavourable --link calibration.json --out DIR [--runs 2]

``one``: one adapter. ``fits``: eight adapters, which fit into stock's slots, and chats which fit
into its pool. ``new``: every prompt is new, so that no KV is reused. ``tiny``: a pool of 3.5 times
the largest adapter. There is a server per case, side and run; the tables are those of
``sglang-elora bench``, with the case in place of the workload.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.matrix import Matrix, Plan, Row, Watcher  # noqa: E402
from sglang_elora.bench.report import report  # noqa: E402
from sglang_elora.bench.result import Result  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes  # noqa: E402
from sglang_elora.workloads import WORKLOADS, Trace, Workload, make_trace  # noqa: E402

CHAT = WORKLOADS["chat"]


@dataclass(frozen=True, slots=True)
class Case:
    workload: Workload
    turns_per_s: float
    sides: Sequence[str]
    stock_kv_tokens: int = Sizes().stock_kv_tokens


CASES = {
    "one": Case(
        replace(CHAT, num_adapters=1),
        2.5,
        ("stock-default", "stock-tuned:1", "stock-tuned:1+grouped+overlap", "elora:elora"),
    ),
    "fits": Case(
        replace(CHAT, num_adapters=8),
        3.0,
        ("stock-default", "stock-tuned:8", "stock-tuned:8+grouped+overlap", "elora:elora"),
        stock_kv_tokens=24_576,
    ),
    "new": Case(
        replace(CHAT, system_tokens=(0, 0), turns=(1, 1), user_tokens=220.0),
        5.0,
        ("stock-default", "stock-tuned:8", "stock-tuned:8+grouped+overlap", "elora:elora"),
    ),
    "tiny": Case(
        replace(CHAT, max_tokens=700),
        2.0,
        ("stock-tuned:1", "stock-tuned:2", "stock-tuned:2+grouped+overlap", "elora:elora"),
        stock_kv_tokens=-4_608,  # 3,584 slots in all, of which the largest adapter takes 1,024
    ),
}


@dataclass(frozen=True, slots=True)
class CasePlan(Plan):
    case: Case | None = None

    def traces(self, workloads: Sequence[str], number: int) -> list[tuple[float, Trace]]:
        assert self.case is not None
        workload = replace(self.case.workload, name=workloads[0])
        return [
            (
                1.0,
                make_trace(
                    workload,
                    turns_per_s=self.case.turns_per_s,
                    duration_s=self.duration_s,
                    seed=number,
                ),
            )
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="unfavourable-") as folder:
            sizes = Sizes(case.stock_kv_tokens)
            link = EmulatedLink.load(options.link)
            bench = Bench(Path(folder), case.workload.num_adapters, sizes, link)
            plan = CasePlan(
                (name,),
                case.sides,
                runs=options.runs,
                duration_s=options.duration,
                seed=options.seed,
                num_adapters=case.workload.num_adapters,
                case=case,
            )
            rows += Matrix(bench, plan, options.out, Watcher.plain()).play()
    print(report(list(map(Result.from_row, rows))))


if __name__ == "__main__":
    main()
