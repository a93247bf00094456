"""Benefit of hints: time from a request's arrival to the start of its adapter's load.

    python -m benchmarks.control.hints --link calibration.json --out FILE

Two servers, with and without hints, are measured alternately. On each, some clients chat without a
pause, with adapters that stay on the device; occasionally a chat arrives whose adapter is not on
the device. Reported for these: the time from arrival to the start of the copy, and the share whose
copy had begun, or was no longer needed, when the scheduler received the request and admitted it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIANTS = Path(__file__).resolve().parents[1] / "serving/variants.py"
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

import httpx  # noqa: E402

from benchmarks.control.chats import chat, text  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes, make_side  # noqa: E402
from sglang_elora.workloads import adapter_name  # noqa: E402

SIDES = ("elora:lru+timed", "elora:lru+timed_without_hints")
NUM_ADAPTERS = 64
STAYING = 3  # adapters of the clients in the background, one each
BLOCK = 24  # cold chats
GAP_S = (0.05, 0.35)  # between an answer's end and the next cold chat, uniform


@dataclass(frozen=True, slots=True)
class Cold:
    """Times of one chat whose adapter was not on the device, in seconds since its arrival."""

    copied_s: float  # start of its adapter's copy
    received_s: float  # by the scheduler
    taken_s: float  # admitted to a batch
    ttft_s: float


async def play_block(url: str, number: int, num_words: int, seed: int) -> list[tuple[str, float]]:
    """(adapter, seconds to the first token) of the cold chats."""
    rng = random.Random(f"hints/{seed}/{number}")
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS) as http:

        async def stay(i: int) -> None:
            own = random.Random(f"stay/{seed}/{number}/{i}")
            while True:
                await chat(http, adapter_name(i), text(own, 40), 32)

        background = [asyncio.create_task(stay(i)) for i in range(STAYING)]
        cold = []
        for i in range(number * BLOCK, (number + 1) * BLOCK):
            await asyncio.sleep(rng.uniform(*GAP_S))
            name = adapter_name(STAYING + i % (NUM_ADAPTERS - STAYING))
            played = await chat(http, name, text(rng, num_words), 8)
            cold.append((name, played.ttft_s))
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        return cold


def moments(path: Path, start: int) -> tuple[list[tuple[str, str, float]], int]:
    """The events written to the file after offset ``start``, and the offset of its end."""
    with path.open() as lines:
        lines.seek(start)
        found = [line.split() for line in lines.read().splitlines()]
        return [(what, adapter_id, float(when)) for what, adapter_id, when in found], lines.tell()


def cold_chats(noted: Sequence[tuple[str, str, float]], ttft_s: Sequence[float]) -> list[Cold]:
    """The cold chats, in the order of ``ttft_s``: those whose adapters were copied, by arrival.

    Raises:
        RuntimeError: Their number differs from that of ``ttft_s``.
    """
    copied = {adapter_id for what, adapter_id, _ in noted if what == "copied"}
    by_adapter: dict[str, dict[str, float]] = {}
    for what, adapter_id, when_s in noted:
        if adapter_id in copied:
            by_adapter.setdefault(adapter_id, {}).setdefault(what, when_s)
    chats = sorted(by_adapter.values(), key=lambda at: at["arrived"])
    if len(chats) != len(ttft_s):
        raise RuntimeError(f"{len(chats)} adapters were copied for {len(ttft_s)} cold chats")
    return [
        Cold(*(at[w] - at["arrived"] for w in ("copied", "received", "taken")), ttft)
        for at, ttft in zip(chats, ttft_s, strict=True)
    ]


def summary(found: Sequence[Cold]) -> dict[str, float]:
    wait_ms = sorted(1e3 * chat.copied_s for chat in found)
    return {
        "arrival_to_copy_mean_ms": statistics.mean(wait_ms),
        "arrival_to_copy_p50_ms": statistics.median(wait_ms),
        "arrival_to_copy_p95_ms": wait_ms[int(0.95 * len(wait_ms))],
        "moving_when_received": statistics.mean(c.copied_s <= c.received_s for c in found),
        "moving_before_taken_ms": 1e3 * statistics.mean(c.taken_s - c.copied_s for c in found),
        "ttft_mean_ms": 1e3 * statistics.mean(c.ttft_s for c in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help=f"blocks of {BLOCK} cold chats")
    parser.add_argument("--words", type=int, nargs="+", default=[100, 600], help="of a cold chat")
    parser.add_argument(
        "--link", type=Path, required=True, help="what sglang_elora.bench.calibrate wrote"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hints-") as folder, ExitStack() as servers:
        bench = Bench(
            Path(folder), NUM_ADAPTERS, Sizes(), EmulatedLink.load(options.link), VARIANTS
        )
        urls, files = [], []
        for name in SIDES:
            side = make_side(name, bench.sizes, NUM_ADAPTERS, 2048)
            files.append(Path(folder) / f"{side.variants[0]}.txt")
            os.environ["MOMENTS"] = str(files[-1])
            log = options.out.parent / "logs" / f"hints-{side.variants[0]}.log"
            urls.append(servers.enter_context(bench.server(side, log)).url)
        number, ends = 0, [0] * len(SIDES)
        for num_words in options.words:
            found: list[list[Cold]] = [[] for _ in SIDES]
            for i in range(-1, options.rounds):  # the first does not count
                for turn in range(len(SIDES)):
                    side = (number + turn) % len(SIDES)
                    played = play_block(urls[side], number, num_words, options.seed)
                    ttft_s = [seconds for _, seconds in asyncio.run(played)]
                    noted, ends[side] = moments(files[side], ends[side])
                    if i >= 0:
                        found[side] += cold_chats(noted, ttft_s)
                number += 1
            for name, chats in zip(SIDES, found, strict=True):
                print(f"{num_words} words, {name}: {summary(chats)}", flush=True)
                rows += [{"words": num_words, "side": name, **asdict(chat)} for chat in chats]
        facts = {**machine(), **bench.facts(), "seed": options.seed}
    options.out.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))


if __name__ == "__main__":
    main()
