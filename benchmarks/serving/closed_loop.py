"""Throughput at saturation, and how long requests of the base model wait among adapters.

    python -m benchmarks.serving.closed_loop [--clients 1 4 16 32] [--sides ...] --out FILE

Clients hold chats without a pause: each sends its next turn when the last answer has ended. A fifth
of the chats use the base model, the others 64 adapters by the popularity of the workload ``chat``.
The sides run one after the other, in an order that rotates with ``--seed``; the first fifth of the
time does not count. No link is emulated unless ``--link`` names a calibration of this machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import httpx  # noqa: E402

from sglang_elora.bench.driver import play_closed  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.record import Record  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes  # noqa: E402
from sglang_elora.workloads import CHAT, Session, Trace, make_trace  # noqa: E402

SIDES = ("stock-default+hicache", "stock-tuned:8+grouped+overlap", "elora:elora")
NUM_ADAPTERS, BASE_SHARE, WARM_UP = 64, 0.2, 0.2


def chats(trace: Trace, count: int, seed: int) -> list[Session]:
    """The trace's first sessions without pauses; a share of them uses the base model."""
    rng = random.Random(f"closed/{seed}")
    found = []
    for session in trace.sessions[:count]:
        turns = tuple(replace(turn, think_s=0.0) for turn in session.turns)
        adapter = "" if rng.random() < BASE_SHARE else session.adapter
        found.append(replace(session, adapter=adapter, turns=turns))
    return found


def figures(records: Sequence[Record]) -> dict[str, float]:
    """Answered tokens per second, and TTFT of requests with adapters and of the base model."""
    end_s = max(r.last_s for r in records if r.last_s is not None)
    mine = [r for r in records if r.due_s >= WARM_UP * end_s and r.first_s is not None]
    found = {"tokens_per_s": sum(r.num_output for r in mine) / ((1 - WARM_UP) * end_s)}
    for kind, of_base in (("adapter", False), ("base", True)):
        ttft = [1e3 * r.ttft_s for r in mine if r.ttft_s is not None and of_base == (not r.adapter)]
        found |= {f"{kind}_ttft_ms": statistics.mean(ttft), f"{kind}_worst_ms": max(ttft)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--sessions", type=int, default=48, help="chats per number of clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--link", type=Path, help="calibration of this machine")
    parser.add_argument("--out", type=Path, required=True, help="rows are appended")
    options = parser.parse_args()
    trace = make_trace(CHAT, turns_per_s=8.0, duration_s=300.0, seed=options.seed)
    sessions = chats(trace, options.sessions, options.seed)
    link = EmulatedLink.load(options.link) if options.link else None
    turn = options.seed % len(options.sides)
    with tempfile.TemporaryDirectory(prefix="closed-loop-") as name:
        bench = Bench(Path(name), NUM_ADAPTERS, Sizes(), link)
        for side_name in [*options.sides[turn:], *options.sides[:turn]]:
            side = bench.side(side_name, trace)
            with bench.server(side, Path(name) / "server.log") as server:
                for clients in options.clients:
                    httpx.post(f"{server.url}{side.flush}", timeout=60, trust_env=False)
                    begun_at = datetime.now(UTC).isoformat(timespec="seconds")
                    records = play_closed(server.url, sessions, clients).records
                    errors = [record.error for record in records if record.error is not None]
                    assert not errors, errors[0]
                    row: dict[str, Any] = {**machine(), **bench.facts(), "begun_at": begun_at}
                    row |= {"side": side_name, "clients": clients, "seed": options.seed}
                    row["records"] = [
                        asdict(replace(r, output=())) | {"tokens": r.num_output} for r in records
                    ]
                    with options.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")
                    told = ", ".join(f"{k} {v:.1f}" for k, v in figures(records).items())
                    print(f"{side_name}, {clients} clients: {told}", flush=True)


if __name__ == "__main__":
    main()
