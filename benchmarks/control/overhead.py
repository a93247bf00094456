"""What the control channel costs requests that need nothing of it.

    python benchmarks/control/overhead.py --link calibration.json --out FILE

Servers that differ in one thing take turns, block by block of the same chats: without the channel's
hooks, with them, and with them under 10,000 announced requests per second (variants.py). Adapters
are on the device and stay; prompts are new. Of each round the ratio of a server's mean time to the
first server's; the interval of their median is of a bootstrap over rounds.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIANTS = Path(__file__).resolve().parents[1] / "serving/variants.py"
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

import httpx  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes, make_side  # noqa: E402
from sglang_elora.workloads import adapter_name  # noqa: E402

SIDES = ("elora:lru+uncontrolled", "elora:lru", "elora:lru+flooded")
NUM_ADAPTERS = 64
WARM = 4  # adapters that are asked for
BLOCK = 16  # chats of each client
NUM_WORDS = 60
NUM_TOKENS = 16
WORDS = ("harbour", "letter", "noon", "recipe", "compare", "train", "soup", "written")


@dataclass(frozen=True, slots=True)
class Chat:
    """Seconds from sending it."""

    ttft_s: float
    latency_s: float


async def chat(http: httpx.AsyncClient, adapter: str, content: str) -> Chat:
    body = {
        "model": f"demo:{adapter}",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    sent_s, first_s = time.monotonic(), None
    async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        assert stream.status_code == 200, await stream.aread()
        async for line in stream.aiter_lines():
            if first_s is None and line.startswith("data: {"):
                first_s = time.monotonic()
    assert first_s is not None
    return Chat(first_s - sent_s, time.monotonic() - sent_s)


async def play_block(url: str, number: int, clients: int, seed: int) -> list[Chat]:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:

        async def hold(client: int) -> list[Chat]:
            rng = random.Random(f"overhead/{seed}/{number}/{client}")
            found = []
            for i in range(BLOCK):
                content = " ".join(rng.choices(WORDS, k=NUM_WORDS))
                found.append(await chat(http, adapter_name((client + i) % WARM), content))
            return found

        return [c for held in await asyncio.gather(*map(hold, range(clients))) for c in held]


async def hints(url: str) -> dict[str, int]:
    """What the tokenizer process counted; nothing without a control channel."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        answer = await http.get("/elora/state")
        return answer.json()["hints"] if answer.status_code == 200 else {}


def interval(ratios: Sequence[float], rng: random.Random) -> tuple[float, float]:
    """In which the median lies with 95%."""
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(4_000))
    return medians[100], medians[-101]


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for clients in sorted({row["clients"] for row in rows}):
        means: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            if row["clients"] == clients:
                for what in ("ttft_s", "latency_s"):
                    by_side = means.setdefault(what, {})
                    by_side.setdefault(row["side"], []).append(
                        statistics.mean(chat[what] for chat in row["chats"])
                    )
        for what, by_side in means.items():
            (_, base), *others = by_side.items()
            lines.append(f"{clients} clients, {what}: {1e3 * statistics.median(base):.2f} ms")
            for side, found in others:
                ratios = [mine / theirs for mine, theirs in zip(found, base, strict=True)]
                low, high = interval(ratios, random.Random(0))
                median = statistics.median(ratios)
                lines.append(f"  {side}: {median:.4f} ({low:.4f} to {high:.4f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--rounds", type=int, default=40, help=f"blocks of {BLOCK} chats a client")
    parser.add_argument("--warm-up", type=int, default=4, help="rounds that do not count")
    parser.add_argument(
        "--link", type=Path, required=True, help="what sglang_elora.bench.calibrate wrote"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, ExitStack() as servers:
        bench = Bench(
            Path(folder), NUM_ADAPTERS, Sizes(), EmulatedLink.load(options.link), VARIANTS
        )
        urls = []
        for name in SIDES:
            log = options.out.parent / "logs" / f"overhead-{name.rpartition('+')[2]}.log"
            side = make_side(name, bench.sizes, NUM_ADAPTERS, 2048)
            urls.append(servers.enter_context(bench.server(side, log)).url)
        number = 0
        for clients in options.clients:
            for i in range(-options.warm_up, options.rounds):
                for turn in range(len(SIDES)):
                    side = (number + turn) % len(SIDES)
                    started_s = time.monotonic()
                    before = asyncio.run(hints(urls[side]))
                    chats = asyncio.run(play_block(urls[side], number, clients, options.seed))
                    after = asyncio.run(hints(urls[side]))
                    if i >= 0:
                        rows.append(
                            {
                                "clients": clients,
                                "side": SIDES[side],
                                "round": number,
                                "wall_s": time.monotonic() - started_s,
                                "hints": {k: after[k] - before[k] for k in after},
                                "chats": [asdict(chat) for chat in chats],
                            }
                        )
                number += 1
        facts = {**machine(), **bench.facts(), "seed": options.seed}
    rows.sort(key=lambda row: (row["clients"], row["round"], SIDES.index(row["side"])))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))
    print(report(rows))


if __name__ == "__main__":
    main()
