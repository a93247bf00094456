"""Overhead of hints for requests that need none: their adapters stay on the device.

    python -m benchmarks.control.overhead --link calibration.json --out FILE

One server changes its mode between blocks of chats (``switched`` of variants.py): no hints, a hint
per request, and 10,000 further hints per second. Generating that many is a mode of its own, since
the server's own thread does it here. Reported is each round's ratio of the median times in two
modes; the interval of the ratios' median is from a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

VARIANTS = Path(__file__).resolve().parents[1] / "serving/variants.py"
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

import httpx  # noqa: E402
import psutil  # noqa: E402

from benchmarks.control.chats import Chat, chat, text  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes, make_side  # noqa: E402
from sglang_elora.workloads import adapter_name  # noqa: E402

SIDE = "elora:lru+switched"
COMPARED = (("on", "off", 1), ("flood", "idle", 1), ("flood", "idle", 3))
"""(mode, compared mode, number of clients) of each comparison."""

NUM_ADAPTERS = 64
WARM = 4  # adapters that requests use
BLOCK = 16  # chats of each client
SETTLING = 4  # chats before a block, not counted, to end effects of the previous mode
NUM_WORDS = 60
SETTLE_S = 0.1  # wait for the server to read its mode
NUM_TOKENS = 16


def keep_apart(cpus: Sequence[int]) -> None:
    """Pin the scheduler to the last processor, and all other processes to the others."""
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        is_scheduler = process.name().startswith("sglang::sched")
        for thread in process.threads():  # affinity is set per thread
            os.sched_setaffinity(thread.id, cpus[-1:] if is_scheduler else cpus[:-1])


async def play_block(url: str, number: str, clients: int, seed: int, length: int) -> list[Chat]:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS) as http:

        async def hold(client: int) -> list[Chat]:
            rng = random.Random(f"overhead/{seed}/{number}/{client}/{length}")
            found = []
            for i in range(length):
                adapter = adapter_name((client + i) % WARM)
                found.append(await chat(http, adapter, text(rng, NUM_WORDS), NUM_TOKENS))
            return found

        return [c for held in await asyncio.gather(*map(hold, range(clients))) for c in held]


async def hints(url: str) -> dict[str, int]:
    """Counts of hints by outcome so far, in the tokenizer process and in the scheduler."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS) as http:
        state = (await http.get("/elora/state")).json()
    counts = {n: count for n, count in state["pool"]["counts"].items() if n.startswith("hints")}
    return {**state["hints"], **counts, "adapter_loads": state["pool"]["counts"]["adapter_loads"]}


def interval(ratios: Sequence[float], rng: random.Random) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(4_000))
    return medians[100], medians[-101]


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for *modes, clients in COMPARED:
        if not any((row["mode"], row["clients"]) == (modes[0], clients) for row in rows):
            continue
        for what in ("ttft_s", "latency_s"):
            mine, theirs = (
                [
                    statistics.median(chat[what] for chat in row["chats"])
                    for row in rows
                    if (row["mode"], row["clients"]) == (mode, clients)
                ]
                for mode in modes
            )
            ratios = [m / t for m, t in zip(mine, theirs, strict=True)]
            low, high = interval(ratios, random.Random(0))
            lines.append(
                f"{clients} clients, {what[:-2]}: {modes[1]} {1e3 * statistics.median(theirs):.2f} "
                f"ms, {modes[0]} / {modes[1]} {statistics.median(ratios):.4f} "
                f"({low:.4f} to {high:.4f})"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24, help=f"blocks of {BLOCK} chats a client")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument(
        "--link", type=Path, required=True, help="what sglang_elora.bench.calibrate wrote"
    )
    parser.add_argument("--only", choices=("on", "flood"), help="leave the other out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, ExitStack() as servers:
        bench = Bench(
            Path(folder), NUM_ADAPTERS, Sizes(), EmulatedLink.load(options.link), VARIANTS
        )
        switch = Path(folder) / "mode"
        switch.write_text("on")
        os.environ["MODE"] = str(switch)
        side = make_side(SIDE, bench.sizes, NUM_ADAPTERS, 2048)
        log = options.out.parent / "logs" / "overhead.log"
        url = servers.enter_context(bench.server(side, log)).url
        keep_apart(sorted(os.sched_getaffinity(0)))
        number = 0
        for *modes, clients in COMPARED:
            if options.only not in (None, modes[0]):
                continue
            for i in range(-options.warm_up, options.rounds):
                for mode in modes if number % 2 else modes[::-1]:
                    switch.write_text(mode)
                    time.sleep(SETTLE_S)
                    block = f"{number}/{mode}"  # chats of its own: none finds the other's KV
                    asyncio.run(play_block(url, block, clients, options.seed, SETTLING))
                    before = asyncio.run(hints(url))
                    chats = asyncio.run(play_block(url, block, clients, options.seed, BLOCK))
                    after = asyncio.run(hints(url))
                    if i >= 0:
                        rows.append(
                            {
                                "clients": clients,
                                "mode": mode,
                                "round": number,
                                "counts": {name: after[name] - before[name] for name in after},
                                "chats": [asdict(chat) for chat in chats],
                            }
                        )
                number += 1
        facts = {**machine(), **bench.facts(), "seed": options.seed}
    rows.sort(key=lambda row: (row["clients"], row["round"]))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))
    print(report(rows))


if __name__ == "__main__":
    main()
