"""Calibrations for GPUs with Llama 3, from data sheets and sizes, without measurements.

python -m benchmarks.sim.roofline [--out benchmarks/sim]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sglang_elora.sim import Calibration

STATIC_SHARE = 0.88
RANKS = (32, 64)  # the paper's


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data sheet of one GPU: bytes, bytes and operations per second, and the shares in use."""

    name: str
    operations_per_s: float  # bfloat16, dense
    used_operations: float
    memory_bytes_per_s: float
    used_bandwidth: float
    memory_bytes: float
    link: str
    link_bytes_per_s: float  # in use

    def sources(self) -> dict[str, str]:
        bandwidth = f"{self.used_bandwidth:.0%} of {self.memory_bytes_per_s / 1e12:g} TB/s per GPU"
        return {
            "prefill_context_s": "4 * hidden * layers operations per pair of tokens, at the rate "
            "of prefill_token_s",
            "decode_step_s": f"roofline: all weights read once, at {bandwidth} ({self.name} data "
            "sheet)",
            "decode_request_s": f"an adapter of rank 32 read once per request, at {bandwidth}: "
            "none shares its adapter",
            "decode_context_s": f"KV of a token read once, at {bandwidth}",
            "batch_s": "chosen: 1 ms of scheduling and launches, as policy.Costs assumes",
            "link_bytes_per_s, link_latency_s": f"{self.link} per GPU, 10 us per copy",
            "to_host_bytes_per_s": "the other direction of the same link",
            "slot_bytes": "keys and values of a token in bfloat16: 2 * layers * 8 heads * 128 * 2 "
            "bytes",
            "pool_slots": f"88% of {self.memory_bytes / 1e9:.0f}e9 bytes per GPU "
            "(--mem-fraction-static 0.88) less the weights",
            "host_slots": "twice the pool: SGLang's default --hicache-ratio",
            "adapter_slots, split_slot": "ranks 32 and 64 on all linear layers in bfloat16, as the "
            "paper's ranks",
            "copies_per_*": "stock: 8 matrices per layer; KV: layer by layer; ours: 11 pieces",
            "max_running": "chosen: 256",
            "prefill_budget": "SGLang's --chunked-prefill-size on GPUs of this size",
        }


PCIE_5 = "sglang_elora.bench.calibrate: PCIe 5 x16 at 55e9 of 64e9"
PCIE_4 = "chosen: PCIe 4 x16 at 22e9 of 32e9"
H200 = Gpu("H200", 989e12, 0.41, 4.8e12, 0.7, 141e9, PCIE_5, 55e9)
H100 = Gpu("H100 SXM", 989e12, 0.41, 3.35e12, 0.7, 80e9, PCIE_5, 55e9)
A10 = Gpu("A10", 125e12, 0.45, 600e9, 0.75, 24e9, PCIE_4, 22e9)
L4 = Gpu("L4", 121e12, 0.45, 300e9, 0.75, 24e9, PCIE_4, 22e9)
OTHERS = {"h100": H100, "a10": A10, "l4": L4}


@dataclass(frozen=True, slots=True)
class Model:
    parameters: float
    layers: int
    hidden: int
    mlp: int
    kv_width: int = 8 * 128

    @property
    def slot_bytes(self) -> int:
        return 2 * self.layers * self.kv_width * 2

    def adapter_bytes(self, rank: int) -> int:
        attention = 4 * self.hidden + 2 * (self.hidden + self.kv_width)
        return 2 * rank * self.layers * (attention + 3 * (self.hidden + self.mlp))


def calibration(
    name: str, model: Model, gpu: Gpu, num_gpus: int, prefill_token_s: float, source: str
) -> Calibration:
    bandwidth = num_gpus * gpu.memory_bytes_per_s * gpu.used_bandwidth
    operations_per_s = 2 * model.parameters / prefill_token_s
    slots = tuple(-(-model.adapter_bytes(rank) // model.slot_bytes) for rank in RANKS)
    free = STATIC_SHARE * gpu.memory_bytes * num_gpus - 2 * model.parameters
    pool_slots = int(free / model.slot_bytes)
    return Calibration(
        name=name,
        sources={"prefill_token_s": source, **gpu.sources()},
        batch_s=1e-3,
        prefill_token_s=prefill_token_s,
        prefill_context_s=_rounded(4 * model.hidden * model.layers / operations_per_s),
        decode_step_s=_rounded(2 * model.parameters / bandwidth),
        decode_request_s=_rounded(model.adapter_bytes(RANKS[0]) / bandwidth),
        decode_context_s=_rounded(model.slot_bytes / bandwidth),
        link_bytes_per_s=num_gpus * gpu.link_bytes_per_s,
        link_latency_s=10e-6,
        to_host_bytes_per_s=num_gpus * gpu.link_bytes_per_s,
        slot_bytes=model.slot_bytes,
        pool_slots=pool_slots,
        host_slots=2 * pool_slots,
        adapter_slots=slots,
        split_slot=max(slots),
        copies_per_adapter=11,
        copies_per_adapter_split=8 * model.layers,
        copies_per_kv_load=model.layers,
        max_running=256,
        prefill_budget=8192,
    )


def with_memory(found: Calibration, name: str, memory_bytes: float, weights: float) -> Calibration:
    """A copy of the calibration for a GPU with ``memory_bytes`` of memory."""
    pool_slots = int((STATIC_SHARE * memory_bytes - weights) / found.slot_bytes)
    source = (
        f"as if {memory_bytes:.0f} bytes of the GPU were there: 88% less the weights; otherwise "
        f"{found.name}"
    )
    return replace(
        found,
        name=name,
        pool_slots=pool_slots,
        host_slots=2 * pool_slots,
        sources={**found.sources, "pool_slots": source},
    )


def _of_8b(name: str, model: Model, gpu: Gpu) -> Calibration:
    """The 8B model on one GPU; prefill by its operations per second."""
    token_s = _rounded(2 * model.parameters / (gpu.operations_per_s * gpu.used_operations))
    source = (
        f"roofline: 2 * 8.03e9 operations per token at {gpu.used_operations:.0%} of "
        f"{gpu.operations_per_s / 1e12:.0f}e12 per second ({gpu.name} data sheet, bfloat16, dense)"
    )
    return calibration(name, model, gpu, 1, token_s, source)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    options = parser.parse_args()
    small = Model(8.03e9, 32, 4096, 14336)
    large = Model(70.6e9, 80, 8192, 28672)
    source = (
        "25,000 tokens/s as in sglang_elora.bench.calibrate: 41% of 989e12 operations/s (H200 "
        "data sheet, bfloat16, dense) for 2 * 8.03e9 per token"
    )
    one = calibration("h200-llama-3-8b", small, H200, 1, 40e-6, source)
    token_s = _rounded(2 * large.parameters / (4 * H200.operations_per_s * H200.used_operations))
    source = (
        "roofline: 2 * 70.6e9 operations per token at 41% of 4 * 989e12 per second, tensor "
        "parallel over 4"
    )
    four = calibration("h200x4-llama-3-70b", large, H200, 4, token_s, source)
    found = {
        "h200-8b": one,
        "h200-8b-32gb": with_memory(one, "h200-llama-3-8b-32gb", 32e9, 2 * small.parameters),
        "h200-70b": four,
        **{f"{key}-8b": _of_8b(f"{key}-llama-3-8b", small, gpu) for key, gpu in OTHERS.items()},
    }
    for name, made in found.items():
        values = asdict(made)
        for key in ("adapter_host_slots", "file_bytes_per_s"):  # their defaults
            del values[key]
        text = json.dumps(values, indent=1)
        (options.out / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
