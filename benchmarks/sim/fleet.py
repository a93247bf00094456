"""Simulation of a fleet of servers behind a router, with the costs of H200s in 32 GB each.

    python -m benchmarks.sim.fleet --servers 32 --adapters 2000 --seeds 0 1 2 --out FILE
    python -m benchmarks.sim.fleet --lose-at 450 --add-at 600 ... --out FILE

One row per workload, seed and router (``sim/routers.py``): TTFT, loads of adapters by all servers,
the share of turns that another server than the one before answered, and the work of the busiest
server over the mean. Host memory holds ``--host-gb`` of adapters per server; others are read from
files. Requests due within the first session's life are not counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.sim.h200 import RATES, Case, of_records, run
from sglang_elora.sim import Calibration, make_engine
from sglang_elora.sim.fleet import Change, Fleet, FleetRecord
from sglang_elora.sim.routers import ROUTERS, Placed
from sglang_elora.workloads import FULL_SIZE, adapter_name

MODEL = "h200-8b-32gb"
FILE_BYTES_PER_S = 2e9


@dataclass(frozen=True, slots=True)
class FleetCase(Case):
    router: str = "placed"
    num_servers: int = 32
    host_gb: float = 64.0
    lose_at_s: float | None = None
    add_at_s: float | None = None

    def calibration(self) -> Calibration:
        found = Case.calibration(self)
        host_slots = round(self.host_gb * 1e9 / found.slot_bytes)
        return replace(found, adapter_host_slots=host_slots, file_bytes_per_s=FILE_BYTES_PER_S)

    def changes(self) -> list[Change]:
        lost = [] if self.lose_at_s is None else [Change(self.lose_at_s, "lost")]
        return lost + ([] if self.add_at_s is None else [Change(self.add_at_s, "added")])


def measured(case: Case) -> Iterable[tuple[Case, dict[str, Any]]]:
    assert isinstance(case, FleetCase)
    calibration = case.calibration()
    names = [adapter_name(i) for i in range(case.num_adapters)]
    router = ROUTERS[case.router]()
    fleet = Fleet(router, lambda: make_engine(case.side, calibration, names), case.num_servers)
    found = fleet.play(case.trace(), case.changes())
    mine = [one for one in found if one.record.due_s >= case.counted_from_s]
    yield (
        case,
        of_records([one.record for one in mine])
        | {
            "imbalance": imbalance(mine),
            "adapter_loads": fleet.num_loads,
            "moved": fleet.num_moves / len(found),
            "resent": fleet.num_resent,
            "placed": router.num_copies if isinstance(router, Placed) else None,
        },
    )


def imbalance(found: Sequence[FleetRecord]) -> float:
    """Tokens that the busiest server computed, over the mean."""
    work: Counter[str] = Counter()
    for one in found:
        work[one.server] += one.record.num_prompt - one.record.num_cached
    return max(work.values()) / statistics.mean(work.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--servers", type=int, default=32)
    add("--adapters", type=int, default=2000)
    add("--workloads", nargs="+", choices=[*FULL_SIZE], default=[*FULL_SIZE])
    add("--routers", nargs="+", choices=[*ROUTERS], default=[*ROUTERS])
    add("--side", default="elora:elora", help="the servers' cache, as in sim/sides.py")
    add("--load", type=float, default=1.0, help="times the rate of the table of one server")
    add("--host-gb", type=float, default=64.0, help="host memory for adapters per server")
    add("--duration", type=float, default=600.0, help="seconds of trace")
    add("--lose-at", type=float, help="second at which a server is lost")
    add("--add-at", type=float, help="second at which a server is added")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [
        FleetCase(
            MODEL,
            workload,
            options.adapters,
            options.side,
            seed,
            options.duration,
            RATES[MODEL][workload] * options.load * options.servers,
            router=router,
            num_servers=options.servers,
            host_gb=options.host_gb,
            lose_at_s=options.lose_at,
            add_at_s=options.add_at,
        )
        for workload in options.workloads
        for seed in options.seeds
        for router in options.routers
    ]
    run(cases, measured, options.out)


if __name__ == "__main__":
    main()
