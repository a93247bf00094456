"""Five specialists over one conversation: plain LoRA, activated LoRA and the base model.

    python -m benchmarks.activated.specialists --rounds N --out FILE [--together]

Each round begins with a new conversation, which the base model answers. Then five adapters are
asked about it, one after the other: each question is the conversation, the adapter's invocation
tokens and a few more. The three ways alternate on one server, in an order that rotates: as plain
LoRAs, as activated LoRAs of the same weights, and without adapters. The cache is flushed before
each. Recorded are, per question, the time to the first token and the prompt tokens computed, and
per conversation the KV tokens on the device at its end.

With ``--together`` nothing is cached: the base model answers nothing first, and the five are asked
at once, as by the branches of a program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import requests  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.testbed.adapters import ALL_LINEAR, AdapterSpec, copy_activated, make_adapters  # noqa: E402
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint  # noqa: E402
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess  # noqa: E402

SHAPE = ModelShape(
    hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=12, num_kv_heads=4
)
WAYS = ("plain", "activated", "base")
NUM_SPECIALISTS, RANK = 5, 16
CONVERSATION, QUESTION = 2_000, 16  # tokens
NUM_ANSWERED = 8


def make_specialists(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """Adapters "plain-i" and "activated-i" of the same weights."""
    specs = [
        AdapterSpec(f"plain-{i}", RANK, RANK, ALL_LINEAR, seed=i) for i in range(NUM_SPECIALISTS)
    ]
    found = make_adapters(checkpoint, folder, specs)
    for i in range(NUM_SPECIALISTS):
        name = f"activated-{i}"
        found[name] = copy_activated(found[f"plain-{i}"], folder / name, invocation(i))
    return found


def invocation(specialist: int) -> list[int]:
    return [2040, 2041 + specialist]


def ask(url: str, adapter: str | None, prompt: Sequence[int]) -> dict[str, Any]:
    """One streamed question: seconds to its first token, and what was computed for it."""
    body: dict[str, Any] = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": NUM_ANSWERED, "ignore_eos": True},
        "stream": True,
    }
    if adapter is not None:
        body["lora_path"] = adapter
    began, first, last = time.perf_counter(), None, {}
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=120) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                last = json.loads(line[6:])
    meta = last["meta_info"]
    computed = meta["prompt_tokens"] - meta["cached_tokens"]
    return {"ttft_s": first, "computed": computed, "ids": last["output_ids"]}


def converse(
    url: str, way: str, conversation: Sequence[int], rng: random.Random, *, together: bool
) -> dict[str, Any]:
    requests.post(f"{url}/flush_cache", timeout=60).raise_for_status()
    said = [*conversation, *([] if together else ask(url, None, conversation)["ids"])]
    names = [None if way == "base" else f"{way}-{i}" for i in range(NUM_SPECIALISTS)]
    prompts = [
        [*said, *invocation(i), *(rng.randrange(3, 2000) for _ in range(QUESTION))]
        for i in range(NUM_SPECIALISTS)
    ]
    with ThreadPoolExecutor(NUM_SPECIALISTS if together else 1) as pool:
        asked = list(pool.map(partial(ask, url), names, prompts))
    state = requests.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]["elora"]
    return {
        "way": way,
        "together": together,
        "ttft_s": [each["ttft_s"] for each in asked],
        "computed": [each["computed"] for each in asked],
        "kv_tokens": state["kv_tokens_device"],
        "adapter_slots": state["adapter_slots"],
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Medians by way, and the ratio to plain LoRAs, round by round, of the mean TTFT."""
    by_way = defaultdict(list)
    for row in rows:
        by_way[row["way"]].append(row)
    plain = [statistics.mean(row["ttft_s"]) for row in by_way["plain"]]
    lines = ["way        TTFT ms   / plain (min to max)   computed per question   KV tokens"]
    for way in WAYS:
        ttft = [statistics.mean(row["ttft_s"]) for row in by_way[way]]
        ratios = sorted(a / b for a, b in zip(ttft, plain, strict=True))
        computed = statistics.mean(c for row in by_way[way] for c in row["computed"])
        kv = statistics.median(row["kv_tokens"] for row in by_way[way])
        lines.append(
            f"{way:9} {1e3 * statistics.median(ttft):8.1f}   {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})   {computed:14.1f}   {kv:15.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--together", action="store_true", help="all five at once, nothing cached")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "base", shape=SHAPE)
        adapters = make_specialists(checkpoint, Path(folder) / "adapters")
        flags = ["--elora", "--model-path", str(checkpoint), "--dtype", "float32"]
        flags += ["--enable-lora", "--max-total-tokens", "20000", "--log-level", "warning"]
        flags += ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
        log_path = args.out.with_suffix(".log")
        rng, rows = random.Random(0), []
        with ServerProcess(flags, log_path=log_path, program=ELORA_SERVER) as server:
            for way in WAYS:  # all adapters are read, all code has run
                short = [rng.randrange(3, 2000) for _ in range(50)]
                converse(server.url, way, short, rng, together=args.together)
            for number in range(args.rounds):
                conversation = [rng.randrange(3, 2000) for _ in range(CONVERSATION)]
                order = [WAYS[(number + i) % len(WAYS)] for i in range(len(WAYS))]
                for way in order:
                    found = converse(server.url, way, conversation, rng, together=args.together)
                    rows.append({"round": number, **found})
        with args.out.open("a") as out:
            for row in rows:
                out.write(json.dumps({"machine": machine(), **row}) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
