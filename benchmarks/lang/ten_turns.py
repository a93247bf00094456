"""Chats of ten turns: share of the history that is found in the cache, by turn.

    python -m benchmarks.lang.ten_turns --link calibration.json --runs 2 --out FOLDER
    python -m benchmarks.lang.ten_turns --report FOLDER

40 adapters, at equal device bytes; live chats and adapters together do not fit. There is a server
per side and run, and all sides replay the same trace. ``chat``: over /v1/chat/completions, where
the history is sent as text; ``ids``: over /generate, with token ids. Only chats with all ten turns
within the trace count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from sglang_elora.bench.driver import Manner, play  # noqa: E402
from sglang_elora.bench.endpoint import Endpoint  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.matrix import rotated  # noqa: E402
from sglang_elora.bench.record import Record  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Side, Sizes  # noqa: E402
from sglang_elora.workloads import WORKLOADS, Trace, make_trace  # noqa: E402

NUM_TURNS = 10
NUM_ADAPTERS = 40
SIDES = ("stock-default", "stock-tuned:8", "elora:elora", "elora:elora+sessions")
WORKLOAD = replace(
    WORKLOADS["chat"],
    name="ten turns",
    turns=(NUM_TURNS, NUM_TURNS),
    user_tokens=60.0,
    think_s=6.0,
    num_adapters=NUM_ADAPTERS,
    max_tokens=4096,
)
TURNS_PER_S = 6.0


def play_side(bench: Bench, side: Side, trace: Trace, api: str, log: Path) -> dict[str, Any]:
    with bench.server(side, log) as server:
        adapters = tuple(sorted({session.adapter for session in trace.sessions}))
        way = "openai" if api == "chat" else "native"
        endpoint = Endpoint(server.url, way, "demo", adapters, is_sglang=True)
        played = play(server.url, trace, Manner(endpoint.open, side.names_sessions))
    return {
        **machine(),
        **bench.facts(),
        "side": side.name,
        "api": api,
        "flags": side.flags,
        "trace": {**trace.facts(), "mean_live_kv_tokens": trace.mean_live_kv_tokens},
        "elora_after": played.after,
        "records": [asdict(record) for record in played.records],
    }


def by_turn(row: dict[str, Any]) -> list[list[tuple[Record, float]]]:
    """Records of complete chats by turn, each with the previous turn's number of tokens."""
    chats: dict[int, list[Record]] = {}
    for record in map(Record.from_row, row["records"]):
        chats.setdefault(record.session, []).append(record)
    whole = [sorted(c, key=lambda r: r.turn) for c in chats.values() if len(c) == NUM_TURNS]
    turns: list[list[tuple[Record, float]]] = [[] for _ in range(NUM_TURNS)]
    for records in whole:
        for before, record in pairwise(records):
            turns[record.turn].append((record, before.num_prompt + before.num_output))
    return turns


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| requests | side | chats | " + " | ".join(map(str, range(2, NUM_TURNS + 1))),
        "| --- | --- | ---: | " + " | ".join(["---:"] * (NUM_TURNS - 1)),
    ]
    lines[0] += " | all | mean TTFT ms | P95 |"
    lines[1] += " | ---: | ---: | ---: |"
    for api, side in sorted({(row["api"], row["side"]) for row in rows}):
        turns: list[list[tuple[Record, float]]] = [[] for _ in range(NUM_TURNS)]
        for row in rows:
            if (row["api"], row["side"]) == (api, side):
                for turn, found in zip(turns, by_turn(row), strict=True):
                    turn += found
        shares = [
            sum(record.num_cached for record, _ in turn) / sum(before for _, before in turn)
            for turn in turns[1:]
        ]
        every = [pair for turn in turns[1:] for pair in turn]
        total = sum(record.num_cached for record, _ in every) / sum(before for _, before in every)
        ttft_ms = sorted(1e3 * r.ttft_s for r, _ in every if r.ttft_s is not None)
        lines.append(
            f"| {api} | {side} | {len(turns[1])} | "
            + " | ".join(f"{share:.2f}" for share in shares)
            + f" | {total:.3f} | {statistics.mean(ttft_ms):.0f} "
            + f"| {ttft_ms[int(0.95 * len(ttft_ms))]:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", type=Path, help="what sglang_elora.bench.calibrate wrote")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--duration", type=float, default=150.0, help="seconds of trace")
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--apis", nargs="+", choices=("chat", "ids"), default=("chat", "ids"))
    parser.add_argument("--report", type=Path, help="only the table of what is there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.report or options.out
    if options.report is None:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ten-turns-") as folder:
            link = EmulatedLink.load(options.link)
            bench = Bench(Path(folder), NUM_ADAPTERS, Sizes(), link)
            for number in range(options.runs):
                trace = make_trace(
                    WORKLOAD, turns_per_s=TURNS_PER_S, duration_s=options.duration, seed=number
                )
                for api in options.apis:
                    sides = [bench.side(name, trace) for name in options.sides]
                    for side in rotated(sides, number):
                        stem = f"{api}-{side.name.replace(':', '_')}-{number}"
                        log = out / "logs" / f"{stem}.log"
                        row = play_side(bench, side, trace, api, log)
                        (out / f"{stem}.json").write_text(json.dumps(row) + "\n")
                        print(stem, flush=True)
    print(report([json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]))


if __name__ == "__main__":
    main()
