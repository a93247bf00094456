"""Calibration of the emulated link: its speed relative to prefill is that of a GPU.

    python -m sglang_elora.bench.calibrate --gpu l4 --out calibration.json

On a CPU a copy from host to device costs almost nothing. The link's bandwidth is chosen so that
one adapter of rank 32 loads in the same share of the prefill time of 1,000 tokens as on the GPU.
Copies to the host have the same bandwidth in a direction of their own.

Not in it: without overlap loading, SGLang 0.5.23 pins every matrix of an adapter at each load
(``LoRAMemoryPool._get_maybe_cached_weight_for_transfer``), which on a GPU allocates and copies
page-locked memory in the scheduler; at some 10 GB/s that is 17 ms for an adapter of rank 32 and an
8B model, five times its time on the link. On the CPU platform pinning does nothing
(``platforms.host_memory``), so loads of stock without ``+overlap`` are cheaper here than there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.bench.machine import machine
from sglang_elora.bench.servers import Bench
from sglang_elora.bench.sides import RANKS, SHAPE, Side, Sizes, adapter_bytes, make_side
from sglang_elora.control.connections import LIMITS
from sglang_elora.workloads import FIRST_TOKEN, adapter_name

RANK = 32
GPU_ADAPTER_BYTES = 168e6  # 83.9 million parameters of rank 32 on all linear layers, 2 bytes each
GPU_COPY_LATENCY_S = 10e-6
_MODEL_FLOP_PER_TOKEN = 2 * 8.03e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates of a GPU with Llama-3-8B in bfloat16, from data sheets; none was measured here.

    ``flops`` are dense bfloat16 operations per second, of which prefill uses ``used``.
    """

    flops: float
    used: float
    link_bytes_per_s: float

    @property
    def prefill_1000_s(self) -> float:
        return 1000 * _MODEL_FLOP_PER_TOKEN / (self.flops * self.used)

    @property
    def load_share(self) -> float:
        """Time of loading an adapter of rank 32 over the prefill time of 1,000 tokens."""
        return GPU_ADAPTER_BYTES / self.link_bytes_per_s / self.prefill_1000_s


_PCIE_4, _PCIE_5 = 22e9, 55e9  # x16, of 32e9 and 64e9 on paper
GPUS: Mapping[str, Gpu] = {
    "l4": Gpu(121e12, 0.45, _PCIE_4),
    "a10": Gpu(125e12, 0.45, _PCIE_4),
    "h100": Gpu(989e12, 0.406, _PCIE_5),
    "h200": Gpu(989e12, 0.406, _PCIE_5),
}
"""Load shares 0.026, 0.027, 0.076, 0.076. The memory of a GPU is not part of it: see ``Sizes``. An
H100 and an H200 have the same link and the same operations per second."""
DEFAULT_GPU = "h200"

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
        httpx.Client(base_url=server.url, timeout=120, trust_env=False, limits=LIMITS) as http,
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


def link(token_s: float, adapter_bytes: int, gpu: Gpu) -> dict[str, float]:
    """Bandwidths and latency for a machine that takes ``token_s`` per additional prefill token.

    Only the slope is used: the GPU's rate is that of full batches, without the cost of a step.
    """
    prefill_1000_s = 1000 * token_s
    gbytes_per_s = adapter_bytes / (gpu.load_share * prefill_1000_s) / 1e9
    return {
        "gbytes_per_s": gbytes_per_s,
        "latency_us": 1e6 * GPU_COPY_LATENCY_S * prefill_1000_s / gpu.prefill_1000_s,
        "to_host_gbytes_per_s": gbytes_per_s,
    }


def calibrate(
    sizes: Sizes, folder: Path, rounds: int, gpu: str = DEFAULT_GPU, threads: int | None = None
) -> dict[str, Any]:
    """Calibrate with a new server, whose files are in ``folder``; takes about 40 s on two cores.

    Args:
        gpu: A key of ``GPUS``.
        threads: Of the calibrating server (``Side.threads``).
    """
    num_adapters = len(RANKS)
    bench = Bench(folder, num_adapters, sizes, link=None)
    name = "stock-default" if threads is None else f"stock-default@{threads}"
    side = make_side(name, sizes, num_adapters, max(LENGTHS))
    samples = measure(bench, side, folder / "calibration.log", rounds)
    step_s, token_s = fit(samples)
    num_bytes = adapter_bytes(RANK, sizes.shape)
    return {
        **machine(),
        "gpu": gpu,
        "link": link(token_s, num_bytes, GPUS[gpu]),
        "prefill": {"a_ms": 1e3 * step_s, "b_ms_per_1000_tokens": 1e6 * token_s},
        "load_share": GPUS[gpu].load_share,
        "adapter_bytes": num_bytes,
        "num_layers": sizes.num_layers,
        "rank": RANK,
        "rounds": rounds,
        "threads": threads,
        "samples_s": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=Sizes().num_layers, help="of the model")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU)
    parser.add_argument("--threads", type=int, help="of the server's OpenMP pool")
    options = parser.parse_args()
    sizes = Sizes(num_layers=options.layers)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        found = calibrate(sizes, Path(folder), options.rounds, options.gpu, options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("link", "prefill", "load_share")}, indent=1))


if __name__ == "__main__":
    main()
