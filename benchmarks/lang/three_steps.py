"""Benefit of tracing a program: three steps with three adapters that are not on the device.

    python -m benchmarks.lang.three_steps --link calibration.json --out FILE

A frontend program makes three calls, each with its own adapter and with the previous answer in its
prompt. Three modes alternate on one server, program by program: ``program`` announces the adapters
of all steps at its start (``sglang_elora.lang.traced``), ``arrival`` relies on the server's hints
at the arrival of each request, and ``none`` disables these too. Measured is the time to finish,
alone and concurrently with clients that chat without a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

VARIANTS = Path(__file__).resolve().parents[1] / "serving/variants.py"
os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

import requests  # noqa: E402
import sglang as sgl  # noqa: E402

import sglang_elora.lang as elora  # noqa: E402
from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.servers import Bench, EmulatedLink  # noqa: E402
from sglang_elora.bench.sides import Sizes, make_side  # noqa: E402
from sglang_elora.workloads import adapter_name  # noqa: E402

SIDE = "elora:lru+switched"
WAYS = {"program": "on", "arrival": "on", "none": "off"}  # and the server's hints at arrival
SWITCH_S = 1.5  # in which the server reads that they are on or off
NUM_ADAPTERS = 64
STAYING = adapter_name(0)  # clients in the background chat with it
COLD = [adapter_name(i) for i in range(1, 61, 2)]  # of rank 16, 32 and 64, and more than fit
STEPS = 3
NUM_TOKENS = 24  # of each answer
WORDS = ("harbour", "letter", "noon", "recipe", "compare", "train", "soup", "written")


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one program run, in seconds."""

    way: str
    clients: int
    round: int
    adapters: Sequence[str]
    total_s: float
    step_s: Sequence[float]  # of each call, as the server tells
    loads: int  # adapters that came to the device meanwhile


@elora.traced
@sgl.function
def three_steps(s: Any, question: str, adapters: Sequence[str]) -> None:
    answer: Any = question
    for i, adapter in enumerate(adapters):
        s += f"\nStep {i}: {answer}"
        s += sgl.gen(f"step {i}", lora_path=adapter)
        answer = s[f"step {i}"]


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def num_loads(url: str) -> int:
    state = requests.get(f"{url}/elora/state", timeout=60).json()
    return int(state["pool"]["counts"]["adapter_loads"])


def run_program(
    way: str, endpoint: sgl.RuntimeEndpoint, number: int, question: str
) -> dict[str, Any]:
    """Run program ``number`` of a server; adapters are cyclic, so that none is on the device."""
    names = [COLD[(number * STEPS + i) % len(COLD)] for i in range(STEPS)]
    elora.prefetch(endpoint, way == "program")
    before = num_loads(endpoint.base_url)
    started_s = time.perf_counter()
    state = three_steps.run(
        question,
        names,
        backend=endpoint,
        temperature=0,
        max_new_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    state.sync()
    total_s = time.perf_counter() - started_s
    if state.error() is not None:
        raise state.error()
    step_s = [state.get_meta_info(f"step {i}")["e2e_latency"] for i in range(STEPS)]
    loads = num_loads(endpoint.base_url) - before
    return {"adapters": names, "total_s": total_s, "step_s": step_s, "loads": loads}


@contextmanager
def chatting(url: str, clients: int, number: int) -> Iterator[None]:
    """Context with clients that send requests without a pause, for an adapter that stays on the
    device."""
    over = threading.Event()

    def chat(i: int) -> None:
        rng = random.Random(f"chat/{number}/{i}")
        sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
        with requests.Session() as http:
            while not over.is_set():
                body = {"text": text(rng, 40), "sampling_params": sampling}
                body["lora_path"] = STAYING
                http.post(f"{url}/generate", json=body, timeout=120).raise_for_status()

    threads = [threading.Thread(target=chat, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def summary(samples: Sequence[Sample]) -> str:
    total_ms = sorted(1e3 * sample.total_s for sample in samples)
    return (
        f"mean {statistics.mean(total_ms):.1f} ms, median {statistics.median(total_ms):.1f}, "
        f"P95 {total_ms[int(0.95 * len(total_ms))]:.1f}, "
        f"{statistics.mean(sample.loads for sample in samples):.2f} loads"
    )


def report(samples: Sequence[Sample], clients: int) -> None:
    """Print times by mode, and the differences to ``none`` per round."""
    by_way = {way: [s for s in samples if (s.way, s.clients) == (way, clients)] for way in WAYS}
    for way, found in by_way.items():
        saved_ms = [
            1e3 * (none.total_s - s.total_s) for none, s in zip(by_way["none"], found, strict=True)
        ]
        print(
            f"{clients} clients, {way}: {summary(found)}; saved to none: median "
            f"{statistics.median(saved_ms):.1f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=42, help="programs of each way")
    parser.add_argument("--words", type=int, default=60, help="of the first prompt")
    parser.add_argument(
        "--host-gb", type=float, help="--elora-host-gb of the servers; with 0 adapters are on disk"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[0, 2], help="beside it")
    parser.add_argument(
        "--link", type=Path, required=True, help="what sglang_elora.bench.calibrate wrote"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="three-steps-") as folder, ExitStack() as servers:
        bench = Bench(
            Path(folder), NUM_ADAPTERS, Sizes(), EmulatedLink.load(options.link), VARIANTS
        )
        side = make_side(SIDE, bench.sizes, NUM_ADAPTERS, 2048)
        if options.host_gb is not None:
            side = replace(side, flags=(*side.flags, "--elora-host-gb", str(options.host_gb)))
        mode = Path(folder) / "mode"
        mode.write_text("on")
        os.environ["MODE"] = str(mode)
        server = servers.enter_context(bench.server(side, Path(folder) / "server.log"))
        endpoint = sgl.RuntimeEndpoint(server.url)
        number = 0
        uncounted = len(COLD) // STEPS  # rounds, until adapters have been there and gone
        for clients in options.clients:
            for i in range(-uncounted, options.rounds):
                rng = random.Random(f"three steps/{options.seed}/{clients}/{i}")
                question = text(rng, options.words)
                ways = list(WAYS.items())
                for way, hints in ways[i % 3 :] + ways[: i % 3]:
                    mode.write_text(hints)
                    with chatting(endpoint.base_url, clients, number):
                        time.sleep(SWITCH_S)
                        found = run_program(way, endpoint, number, question)
                    number += 1
                    if i >= 0:
                        samples.append(Sample(way=way, clients=clients, round=i, **found))
            uncounted = 2
            report(samples, clients)
        facts = {**machine(), **bench.facts(), "seed": options.seed, "words": options.words}
        facts["host_gb"] = options.host_gb
    rows = [facts, *(asdict(sample) for sample in samples)]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
