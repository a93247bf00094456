"""Comparison of SGLang's own benchmark with ours, on one server and the same requests.

    python -m benchmarks.serving.cross_check --out FILE

A stock server and one adapter. Both benchmarks alternately send the same texts to
``/v1/completions``, with answers of equal length; the cache is emptied each time. First with
``--clients`` clients without a pause (closed loop), then at ``--rate`` with each benchmark's own
Poisson arrivals. Lengths of prompts are random; the seed is in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.bench.apis import Completions, words
from sglang_elora.bench.driver import Manner, play, play_closed
from sglang_elora.bench.machine import machine
from sglang_elora.bench.servers import Bench
from sglang_elora.bench.sides import Sizes
from sglang_elora.workloads import CHAT, Session, Trace, Turn, adapter_name

TOOLS = ("ours", "sglang.bench_serving")
PROMPT_WORDS = (40, 240)
OUTPUT_TOKENS = 24
ADAPTER = adapter_name(0)
MODEL = f"demo:{ADAPTER}"


@dataclass(frozen=True, slots=True)
class Load:
    """Requests and their arrivals: from ``clients`` without a pause, or at ``rate`` per second."""

    sessions: tuple[Session, ...]
    clients: int
    rate: float | None

    @property
    def name(self) -> str:
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g} requests/s"


def loads(count: int, clients: int, rate: float, seed: int) -> list[Load]:
    rng = random.Random(f"cross/{seed}")
    turns = [
        Turn(tuple(rng.choices(range(3, 2048), k=rng.randint(*PROMPT_WORDS))), OUTPUT_TOKENS, 0.0)
        for _ in range(count)
    ]
    starts, now_s = [], 0.0
    for _ in turns:
        now_s += rng.expovariate(rate)
        starts.append(now_s)
    at_once = [Session(i, ADAPTER, 0.0, (), (turn,)) for i, turn in enumerate(turns)]
    spread = [
        Session(i, ADAPTER, start_s, (), (turn,))
        for i, (turn, start_s) in enumerate(zip(turns, starts, strict=True))
    ]
    return [Load(tuple(at_once), clients, None), Load(tuple(spread), clients, rate)]


def ours(url: str, load: Load, seed: int) -> list[dict[str, float]]:
    """Times of each request in milliseconds, measured by our benchmark."""
    manner = Manner(partial(Completions, model=MODEL))
    if load.rate is None:
        played = play_closed(url, load.sessions, load.clients, manner)
    else:
        end_s = load.sessions[-1].start_s + 1.0
        played = play(url, Trace(CHAT, seed, load.rate, end_s, load.sessions), manner)
    errors = [record.error for record in played.records if record.error is not None]
    assert not errors, errors[0]
    return [
        {"ttft_ms": 1e3 * (r.first_s - r.sent_s), "tpot_ms": 1e3 * r.tpot_s}
        for r in played.records
        if r.first_s is not None and r.tpot_s is not None
    ]


def theirs(url: str, load: Load, seed: int, tokenizer: Path) -> list[dict[str, float]]:
    """Times of each request in ms, from the output file of ``sglang.bench_serving``."""
    data, out = (tokenizer.parent / name for name in ("prompts.jsonl", "details.jsonl"))
    turns = [{"content": words(session.turns[0].new_tokens)} for session in load.sessions]
    answer = {"content": words(range(OUTPUT_TOKENS))}
    data.write_text("".join(json.dumps({"conversations": [t, answer]}) + "\n" for t in turns))
    out.unlink(missing_ok=True)
    when = (
        ("--max-concurrency", str(load.clients))
        if load.rate is None
        else ("--request-rate", f"{load.rate:g}")
    )
    command = (
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai"),
        *("--base-url", url, "--model", "demo", "--tokenizer", str(tokenizer)),
        *("--lora-name", ADAPTER, "--dataset-name", "custom", "--dataset-path", str(data)),
        *("--num-prompts", str(len(turns)), "--sharegpt-output-len", str(OUTPUT_TOKENS)),
        *("--seed", str(seed), "--warmup-requests", "0", "--disable-tqdm", *when),
        *("--output-file", str(out), "--output-details"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(out.read_text())
    assert told["completed"] == len(turns), told["errors"]
    rows = []
    for ttft_s, gaps_s in zip(told["ttfts"], told["itls"], strict=True):
        rows.append({"ttft_ms": 1e3 * ttft_s, "tpot_ms": 1e3 * sum(gaps_s) / (OUTPUT_TOKENS - 1)})
    return rows


def summary(rows: Sequence[dict[str, float]]) -> str:
    parts = []
    for name in ("ttft_ms", "tpot_ms"):
        values = [row[name] for row in rows]
        parts.append(
            f"{name} mean {statistics.mean(values):.1f} median {statistics.median(values):.1f}"
        )
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cross-") as name:
        folder = Path(name)
        bench = Bench(folder, 1, Sizes(), link=None)
        given = loads(options.requests, options.clients, options.rate, options.seed)
        side = bench.side("stock-default", Trace(CHAT, options.seed, 1.0, 1.0, given[0].sessions))
        with bench.server(side, folder / "server.log") as server:
            ours(server.url, given[0], options.seed)  # does not count
            for number in range(options.rounds):
                for load in given:
                    for tool in TOOLS[:: -1 if number % 2 else 1]:
                        flushed = httpx.post(f"{server.url}/flush_cache?timeout=30", timeout=60)
                        flushed.raise_for_status()
                        if tool == "ours":
                            found = ours(server.url, load, options.seed)
                        else:
                            found = theirs(server.url, load, options.seed, bench.checkpoint)
                        print(f"{load.name}, round {number}, {tool}: {summary(found)}", flush=True)
                        about = {"load": load.name, "tool": tool, "round": number}
                        rows += [{**about, **row} for row in found]
    for load in given:
        for tool in TOOLS:
            mine = [row for row in rows if row["load"] == load.name and row["tool"] == tool]
            print(f"{load.name}, {tool}: {summary(mine)}")
    facts = {**machine(), "seed": options.seed, "output_tokens": OUTPUT_TOKENS}
    options.out.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))


if __name__ == "__main__":
    main()
