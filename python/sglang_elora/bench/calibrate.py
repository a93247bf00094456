"""Calibration of the emulated link: its speed relative to prefill is that of a GPU.

    python -m sglang_elora.bench.calibrate --out calibration.json

On a CPU a copy from host to device costs almost nothing. The link's bandwidth is chosen so that
one adapter of rank 32 loads in the same share of the prefill time of 1,000 tokens as on an H200.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.bench.machine import machine
from sglang_elora.bench.servers import Bench
from sglang_elora.bench.sides import RANKS, SHAPE, Side, Sizes, adapter_bytes, make_side
from sglang_elora.workloads import FIRST_TOKEN, adapter_name

# Assumptions about an H200 with Llama-3-8B in bfloat16; none was measured here.
RANK = 32
GPU_ADAPTER_BYTES = 168e6  # 83.9 million parameters of rank 32 on all linear layers, 2 bytes each
GPU_LINK_BYTES_PER_S = 55e9  # PCIe 5 x16, of 64e9 on paper
GPU_PREFILL_TOKENS_PER_S = 25_000.0
GPU_COPY_LATENCY_S = 10e-6
GPU_LOAD_S = GPU_ADAPTER_BYTES / GPU_LINK_BYTES_PER_S  # 3.05 ms
GPU_PREFILL_1000_S = 1000 / GPU_PREFILL_TOKENS_PER_S  # 40 ms
LOAD_SHARE = GPU_LOAD_S / GPU_PREFILL_1000_S  # 0.076

LENGTHS = (128, 256, 512, 768, 1024, 1536)


def ttft_s(http: httpx.Client, prompt: Sequence[int]) -> float:
    """TTFT of a single request on an idle server, with its adapter on the device."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        "lora_path": adapter_name(RANKS.index(RANK)),
    }
    started = time.perf_counter()
    answer = http.post("/generate", json=body)
    elapsed_s = time.perf_counter() - started
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["meta_info"]["cached_tokens"] == 0
    return elapsed_s


def measure(bench: Bench, side: Side, log_path: Path, rounds: int) -> dict[int, list[float]]:
    """Seconds to the first token by prompt length; lengths alternate."""
    samples: dict[int, list[float]] = {length: [] for length in LENGTHS}
    with (
        bench.server(side, log_path) as server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http,
    ):
        for number in range(-1, rounds):  # round -1 is a warm-up
            for length in LENGTHS:
                rng = random.Random(f"{number}/{length}")
                prompt = rng.choices(range(FIRST_TOKEN, SHAPE.vocab_size), k=length)
                elapsed_s = ttft_s(http, prompt)
                if number >= 0:
                    samples[length].append(elapsed_s)
    return samples


def fit(samples: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """(a, b) in seconds of the least-squares fit a + b * tokens to the medians."""
    fitted = statistics.linear_regression(
        list(samples), [statistics.median(found) for found in samples.values()]
    )
    return fitted.intercept, fitted.slope


def link(token_s: float, adapter_bytes: int) -> dict[str, float]:
    """Bandwidth and latency for a machine that takes ``token_s`` per additional prefill token.

    Only the slope is used: the GPU's rate is that of full batches, without the cost of a step.
    """
    prefill_1000_s = 1000 * token_s
    return {
        "gbytes_per_s": adapter_bytes / (LOAD_SHARE * prefill_1000_s) / 1e9,
        "latency_us": 1e6 * GPU_COPY_LATENCY_S * prefill_1000_s / GPU_PREFILL_1000_S,
    }


def calibrate(sizes: Sizes, folder: Path, rounds: int) -> dict[str, Any]:
    """Calibrate with a new server, whose files are in ``folder``; takes about 40 s on two cores."""
    num_adapters = len(RANKS)
    bench = Bench(folder, num_adapters, sizes, link=None)
    side = make_side("stock-default", sizes, num_adapters, max(LENGTHS))
    samples = measure(bench, side, folder / "calibration.log", rounds)
    step_s, token_s = fit(samples)
    num_bytes = adapter_bytes(RANK, sizes.shape)
    return {
        **machine(),
        "link": link(token_s, num_bytes),
        "prefill": {"a_ms": 1e3 * step_s, "b_ms_per_1000_tokens": 1e6 * token_s},
        "load_share": LOAD_SHARE,
        "adapter_bytes": num_bytes,
        "num_layers": sizes.num_layers,
        "rank": RANK,
        "samples_s": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=Sizes().num_layers, help="of the model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        found = calibrate(Sizes(num_layers=options.layers), Path(folder), options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("link", "prefill", "load_share")}, indent=1))


if __name__ == "__main__":
    main()
