"""Time that the load of an adapter adds to the TTFT of the request that needs it.

    python -m benchmarks.serving.cold --link calibration-8-layers.json --layers 8 --out FILE

Three servers that differ only in adapter loads: ELORA's loads, loads that block the scheduler, and
loads that take no time on the link (variants.py). Clients send requests without a pause, each for
an adapter that is not on the device. The servers alternate, with the same block of requests, so
that disturbances of the machine affect all three; intervals are from a bootstrap over these rounds.
``added.py FILE`` prints the report again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

VARIANTS = Path(__file__).with_name("variants.py")
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

from benchmarks.serving.added import report  # noqa: E402
from sglang_elora.bench.driver import play_closed  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.record import Played  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes, make_side  # noqa: E402
from sglang_elora.workloads import CHAT, FIRST_TOKEN, Session, Turn, adapter_name  # noqa: E402

POLICY = "lru"  # with adapters asked for in turns, none is there when its turn comes
SIDES = (f"elora:{POLICY}", f"elora:{POLICY}+blocking", f"elora:{POLICY}+free")
NUM_ADAPTERS = 64
PROMPT_TOKENS = (140, 280)  # shortest and longest
OUTPUT_TOKENS = (8, 32)
BLOCK = 32  # requests


def requests(number: int, seed: int) -> list[Session]:
    """Sessions of block ``number``: one turn each, no common prefix, cyclic adapters."""
    rng = random.Random(f"cold/{seed}/{number}")
    return [
        Session(i, adapter_name(i % NUM_ADAPTERS), 0.0, (), (_turn(rng),))
        for i in range(number * BLOCK, (number + 1) * BLOCK)
    ]


def _turn(rng: random.Random) -> Turn:
    tokens = rng.choices(range(FIRST_TOKEN, CHAT.vocab_size), k=rng.randint(*PROMPT_TOKENS))
    return Turn(tuple(tokens), rng.randint(*OUTPUT_TOKENS), 0.0)


def play_round(urls: Sequence[str], number: int, clients: int, seed: int) -> list[Played]:
    """Results of one block on each server, in the order of ``SIDES``; the first server rotates.

    Raises:
        RuntimeError: A request failed, or its adapter was already on the device.
    """
    played: dict[int, Played] = {}
    for i in range(len(urls)):
        side = (number + i) % len(urls)
        played[side] = play_closed(urls[side], requests(number, seed), clients)
        _check(SIDES[side], played[side])
    return [played[side] for side in range(len(urls))]


def _check(side: str, played: Played) -> None:
    errors = [record.error for record in played.records if record.error is not None]
    if errors or played.before is None or played.after is None:
        raise RuntimeError(f"{side}: {errors[:1]}")
    loads = played.after["adapter_loads"] - played.before["adapter_loads"]
    if loads != len(played.records):
        raise RuntimeError(f"{side}: {loads} loads for {len(played.records)} requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--rounds", type=int, default=20, help=f"blocks of {BLOCK} requests")
    parser.add_argument("--warm-up", type=int, default=4, help="rounds that do not count")
    parser.add_argument("--layers", type=int, default=Sizes().num_layers, help="of the model")
    parser.add_argument(
        "--link", type=Path, required=True, help="what sglang_elora.bench.calibrate wrote"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes = Sizes(num_layers=options.layers)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cold-") as folder, ExitStack() as servers:
        bench = Bench(Path(folder), NUM_ADAPTERS, sizes, EmulatedLink.load(options.link), VARIANTS)
        sides = [make_side(name, sizes, NUM_ADAPTERS, sum(PROMPT_TOKENS)) for name in SIDES]
        logs = options.out.parent / "logs"
        urls = [
            servers.enter_context(bench.server(side, logs / f"cold-{side.name}.log")).url
            for side in sides
        ]
        number = 0
        for clients in options.clients:
            for _ in range(options.warm_up):
                play_round(urls, number, clients, options.seed)
                number += 1
            for _ in range(options.rounds):
                played = play_round(urls, number, clients, options.seed)
                rows += [
                    {"clients": clients, "side": side, "round": number, **asdict(record)}
                    for side, of_side in zip(SIDES, played, strict=True)
                    for record in of_side.records
                ]
                number += 1
        facts = {**machine(), **bench.facts(), "seed": options.seed}
    options.out.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))
    print(report(rows))


if __name__ == "__main__":
    main()
