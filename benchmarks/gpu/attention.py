"""Every attention backend that loads on this GPU, under ``--elora`` with kernels and CUDA graphs.

    python benchmarks/gpu/attention.py --out OUT_DIR [--backends triton flashinfer fa3 ...]

For each, servers with ``elora_triton`` and with ``elora_torch`` answer the same requests, mixed in
one batch and again from the cache; tokens are compared with each other and with transformers + PEFT
in float32. Writes OUT_DIR/attention.json. Needs what bundle.sh packs (start.sh unpacks it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

import torch  # noqa: E402

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable  # noqa: E402

ensure_torchvision_importable()

from adapters import NAMES, SPECS  # noqa: E402
from client import Client, run  # noqa: E402
from reference import Reference  # noqa: E402
from server_flags import server_flags  # noqa: E402
from sglang_elora.demo.adapters import make_adapters  # noqa: E402
from sglang_elora.demo.checkpoint import ModelShape, make_checkpoint  # noqa: E402
from sglang_elora.demo.server import ELORA_SERVER, ServerProcess, ServerStartError  # noqa: E402

BACKENDS = ("triton", "flashinfer", "fa3", "torch_native")
DTYPES = {"triton": "float32", "torch_native": "float32"}  # the others know no float32
WHO = (None, *NAMES)
NUM_TOKENS = 16
TEXTS = (
    "The train to the harbour leaves at noon",
    "Please compare the two letters and tell me which one was written first, " * 6,
)
Tokens = list[list[int]]


def answers(
    backend: str, lora: str, dtype: str, flags: Sequence[str], prompts: Tokens, out: Path
) -> dict[str, Any]:
    """Tokens of one server, or why it did not start, and what its log says of CUDA graphs."""
    log_path = out / f"attention-{backend}-{lora}.log"

    async def ask(client: Client) -> Tokens:
        tokens = []
        for prompt in (*prompts, *prompts):  # the second time from the cache
            requests = [client.generate(name, prompt, num_tokens=NUM_TOKENS) for name in WHO]
            tokens += [list(answer.token_ids) for answer in await asyncio.gather(*requests)]
        return tokens

    command = ["--elora", "--elora-check", "--lora-backend", lora, "--dtype", dtype]
    command += [*flags, "--attention-backend", backend]
    try:
        with ServerProcess(
            command, log_path=log_path, program=ELORA_SERVER, startup_timeout_s=300
        ) as server:
            tokens = run(server.url, ask)
    except (ServerStartError, AssertionError) as error:
        return {"error": str(error)[-2000:]}
    log = log_path.read_text(errors="replace")
    return {
        "tokens": tokens,
        "captured": sorted(set(re.findall(r"Capture \w+ [\w ]*graph begin", log))),
        "replayed": bool(re.search(r"Decode batch.*graph: True", log)),
    }


def share_equal(some: Tokens, others: Tokens) -> float:
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": name,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "sglang")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--lora", nargs="+", default=("elora_triton", "elora_torch"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        # Head dimension 64: flashinfer knows no smaller one.
        shape = ModelShape(num_heads=4, num_kv_heads=2, head_dim=64)
        checkpoint = make_checkpoint(Path(work) / "base", shape=shape)
        adapters = make_adapters(checkpoint, Path(work) / "adapters", SPECS)
        reference = Reference(checkpoint, adapters)
        prompts = [reference.tokenizer.encode(text) for text in TEXTS]
        truth = [
            reference.generate(name, prompt, NUM_TOKENS) for prompt in prompts for name in WHO
        ] * 2
        flags = [
            *server_flags(checkpoint, adapters),
            *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        ]
        rows = []
        for backend in options.backends:
            dtype = DTYPES.get(backend, "bfloat16")
            row: dict[str, Any] = {"attention": backend, "dtype": dtype}
            for lora in options.lora:
                row[lora] = answers(backend, lora, dtype, flags, prompts, options.out)
                if "tokens" in row[lora]:
                    row[lora]["equal_to_peft_float32"] = share_equal(row[lora]["tokens"], truth)
            found = [row[lora]["tokens"] for lora in options.lora if "tokens" in row[lora]]
            if len(found) == 2:
                row["equal_to_each_other"] = share_equal(*found)
            rows.append(row)
            result = {"machine": machine(), "num_tokens": NUM_TOKENS, "rows": rows}
            (options.out / "attention.json").write_text(json.dumps(result, indent=1))
            brief = {k: v for k, v in row.items() if k not in options.lora}
            for lora in options.lora:
                brief[lora] = {k: v for k, v in row[lora].items() if k != "tokens"}
            print(json.dumps(brief), flush=True)


if __name__ == "__main__":
    main()
