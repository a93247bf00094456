"""Stock and ELORA servers at the size of Llama-3-8B with 100 adapters, on the same traces.

    python -m benchmarks.gpu.serve --out OUT_DIR [--workloads chat] [--sides ...] [--dry-run]

Weights are random, with the shapes of Llama-3-8B; 100 adapters of rank 32 and 64 on all linear
layers; those of one rank share one file, as only their size matters here. Traces are those of the
simulator's H200 (``sim/h200.py``), with its pool of 32 GB. One call for one workload and the four
sides takes about 8 minutes: a server per side is started and measured for --duration. Rows have the
format of ``sglang-elora bench``, whose report shows them:

    python -m sglang_elora.bench.report OUT_DIR

Needs the bundle of bundle.sh. --dry-run runs everything on a CPU with a tiny
model; its figures are meaningless.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

from safetensors.torch import save_file  # noqa: E402

from sglang_elora.bench.matrix import Matrix, Plan, Watcher  # noqa: E402
from sglang_elora.bench.report import report  # noqa: E402
from sglang_elora.bench.result import Result  # noqa: E402
from sglang_elora.bench.sides import Side, Sizes, make_side  # noqa: E402
from sglang_elora.testbed.checkpoint import ModelShape  # noqa: E402
from sglang_elora.testbed.server import ServerProcess  # noqa: E402
from sglang_elora.workloads import FULL_SIZE, Trace, adapter_name, make_trace  # noqa: E402

NUM_ADAPTERS = 100
RANKS = (32, 64)
SIDES = ("stock-default", "stock-tuned:22", "elora:lru", "elora:elora")
"""22 slots are the best split of the simulated H200."""

TURNS_PER_S = {"chat": 8.0, "translation": 24.0, "agent": 12.0}  # as sim/h200.py, 32 GB
LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128_256, 8192)
TINY = ModelShape(vocab_size=128_256)
GPU_FLAGS = ("--sampling-backend", "pytorch", "--grammar-backend", "none")
BYTES = 2  # of bfloat16


class GpuSizes(Sizes):
    """Sizes for this model; ``stock_kv_tokens`` is in addition to stock's default adapter slots."""

    tiny = False

    @property
    def shape(self) -> ModelShape:
        return TINY if self.tiny else LLAMA_8B

    @property
    def adapter_slot_bytes(self) -> int:
        widths = projections(self.shape).values()
        layer = sum(rows + columns for rows, columns in widths)
        return self.shape.num_layers * max(RANKS) * layer * BYTES

    @property
    def slot_bytes(self) -> int:
        shape = self.shape
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * BYTES


class TinySizes(GpuSizes):
    tiny = True


def projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Output and input width of each linear layer of a decoder layer."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def write_model(folder: Path, shape: ModelShape) -> Path:
    """Random weights, all layers alike, a file each. ``--load-format dummy`` would do without, but
    SGLang then reads no adapters either."""
    folder.mkdir()
    widths = projections(shape)
    layer = {f"{name}.weight": random(*width) for name, width in widths.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[f"{name}.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    for i in range(shape.num_layers):
        weights = {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        save_file(weights, folder / f"layer-{i:02}.safetensors")
    tokens = random(shape.vocab_size, shape.hidden_size)
    ends = {
        "model.embed_tokens.weight": tokens,
        "lm_head.weight": tokens.clone(),
        "model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16),
    }
    save_file(ends, folder / "ends.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random(rows: int, columns: int) -> torch.Tensor:
    """bfloat16 ``[rows, columns]``, of variance 1 over the columns."""
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5)


def write_adapters(folder: Path, shape: ModelShape) -> dict[str, Path]:
    """Write adapters in PEFT's format; those of one rank link to one file of weights."""
    modules = projections(shape)
    for rank in RANKS:
        weights = {}
        for layer in range(shape.num_layers):
            for name, (rows, columns) in modules.items():
                path = f"base_model.model.model.layers.{layer}.{name}"
                weights[f"{path}.lora_A.weight"] = random(rank, columns)
                weights[f"{path}.lora_B.weight"] = 0.1 * random(rows, rank)
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / f"rank-{rank}.safetensors")
    found = {}
    for i in range(NUM_ADAPTERS):
        rank = RANKS[i % len(RANKS)]
        path = found[adapter_name(i)] = folder / adapter_name(i)
        path.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [name.rpartition(".")[2] for name in modules],
            "bias": "none",
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        (path / "adapter_model.safetensors").symlink_to(folder / f"rank-{rank}.safetensors")
    return found


class GpuBench:
    """Bench for ``Matrix`` with servers on a GPU."""

    def __init__(self, folder: Path, sizes: GpuSizes, flags: Sequence[str]) -> None:
        self.sizes, self._flags = sizes, flags
        self._model = write_model(folder / "model", sizes.shape)
        self._adapters = write_adapters(folder / "adapters", sizes.shape)

    def side(self, name: str, trace: Trace) -> Side:
        longest = max(session.num_tokens for session in trace.sessions)
        return make_side(name, self.sizes, NUM_ADAPTERS, longest)

    def server(self, side: Side, log_path: Path) -> ServerProcess:
        flags = [
            *("--model-path", str(self._model), "--dtype", "bfloat16"),
            *("--skip-tokenizer-init", "--max-running-requests", "64", "--enable-lora"),
            *("--max-lora-rank", str(max(RANKS)), "--enable-cache-report"),
            *("--lora-paths", *(f"{name}={path}" for name, path in self._adapters.items())),
            *side.flags,
            *self._flags,
        ]
        return ServerProcess(flags, log_path=log_path, program=side.program, startup_timeout_s=400)

    def facts(self) -> dict[str, Any]:
        gpu = None
        if torch.cuda.is_available():
            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
            gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return {
            "sizes": {**self.sizes.facts(), "ranks": RANKS},
            "link": None,
            "num_adapters": NUM_ADAPTERS,
            "gpu": gpu,
        }


@dataclass(frozen=True, slots=True)
class GpuPlan(Plan):
    tiny: bool = False

    def traces(self, workloads: Sequence[str], number: int) -> list[tuple[float, Trace]]:
        found = []
        for name in workloads:
            workload = replace(FULL_SIZE[name], num_adapters=NUM_ADAPTERS)
            for load in self.loads:
                rate = load * (0.5 if self.tiny else TURNS_PER_S[name])
                trace = make_trace(
                    workload, turns_per_s=rate, duration_s=self.duration_s, seed=number
                )
                found.append((load, trace))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", choices=FULL_SIZE, default=["chat"])
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--loads", nargs="+", type=float, default=[1.0])
    parser.add_argument("--duration", type=float, default=50.0, help="seconds of trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock-kv-tokens", type=int, default=71_835, help="of 92,315 slots")
    parser.add_argument("--attention-backend", default="triton", help="flashinfer, fa3, triton")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    tiny = options.dry_run
    kind, shape = (TinySizes, TINY) if tiny else (GpuSizes, LLAMA_8B)
    sizes = kind(options.stock_kv_tokens, num_layers=shape.num_layers)
    flags = () if tiny else ("--attention-backend", options.attention_backend, *GPU_FLAGS)
    plan = GpuPlan(
        options.workloads,
        options.sides,
        runs=1,
        loads=options.loads,
        duration_s=options.duration,
        seed=options.seed,
        num_adapters=NUM_ADAPTERS,
        shares_servers=True,
        num_together=1,  # a server's share of the GPU's memory is of all of it
        tiny=tiny,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        bench: Any = GpuBench(Path(folder), sizes, flags)
        rows = Matrix(bench, plan, options.out, Watcher.plain()).play()
    text = report(list(map(Result.from_row, rows)))
    (options.out / "tables.txt").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
