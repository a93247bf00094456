"""Are vLLM's greedy outputs those of transformers + PEFT, as shipped and with LoRA ops replaced?

    python -m benchmarks.vllm.check --vllm-python ../vllm-env/bin/python [--out FILE]

Requests of the base model and of adapters with all ranks are sent twice: one at a time, then all at
once, so that batches have rows of both. The answers are compared with those of transformers + PEFT
in float32 on the same checkpoint. Exits with 1 if an answer of the side with LoRA ops replaced
differs; errors of the shipped ones are only reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import httpx  # noqa: E402

from sglang_elora.bench.machine import machine  # noqa: E402
from sglang_elora.bench.sides import RANKS, SHAPE, Sizes, adapter_specs  # noqa: E402
from sglang_elora.bench.vllm.client import MODEL  # noqa: E402
from sglang_elora.bench.vllm.side import (  # noqa: E402
    installed_version,
    make_vllm_side,
    vllm_server,
)
from sglang_elora.control.connections import LIMITS  # noqa: E402
from sglang_elora.testbed.adapters import make_adapters  # noqa: E402
from sglang_elora.testbed.checkpoint import make_checkpoint  # noqa: E402
from sglang_elora.workloads import FIRST_TOKEN  # noqa: E402
from tests.harness.reference import Reference  # noqa: E402

NUM_BASE, NUM_OUTPUT = 4, 16
LENGTHS = (20, 90, 160)
SIDES = ("vllm:6", "vllm:6+grouped")
Question = tuple[str | None, list[int]]  # adapter (None is the base model) and prompt


def questions(adapters: Sequence[str]) -> list[Question]:
    """One per adapter, with prompts of the base model between them."""
    rng = random.Random(0)
    names: list[str | None] = [*adapters, *([None] * NUM_BASE)]
    rng.shuffle(names)
    return [
        (name, rng.choices(range(FIRST_TOKEN, SHAPE.vocab_size), k=LENGTHS[i % len(LENGTHS)]))
        for i, name in enumerate(names)
    ]


async def answers(url: str, asked: Sequence[Question], together: bool) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS) as http:

        async def answer(question: Question) -> list[int]:
            adapter, prompt = question
            options = {"temperature": 0, "max_tokens": NUM_OUTPUT, "ignore_eos": True}
            body = {"model": adapter or MODEL, "prompt": prompt, "return_token_ids": True}
            found = await http.post("/v1/completions", json={**body, **options})
            found.raise_for_status()
            tokens: list[int] = found.json()["choices"][0]["token_ids"]
            return tokens

        if together:
            return await asyncio.gather(*map(answer, asked))
        return [await answer(question) for question in asked]


def differences(
    asked: Sequence[Question], got: Sequence[list[int]], reference: Reference
) -> dict[str, Any]:
    """Per kind of request: how many, how many differ, and the first differing tokens."""
    rows: dict[str, list[int | None]] = {"base model": [], "adapters": []}
    for (adapter, prompt), tokens in zip(asked, got, strict=True):
        right = reference.generate(adapter, prompt, NUM_OUTPUT)
        first = next(
            (i for i, (a, b) in enumerate(zip(tokens, right, strict=True)) if a != b), None
        )
        rows["adapters" if adapter else "base model"].append(first)
    return {
        kind: {
            "requests": len(found),
            "different": sum(first is not None for first in found),
            "first_different_token": [first for first in found if first is not None],
        }
        for kind, found in rows.items()
    }


def measure(side_name: str, python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The differences of one side, by how the requests are sent and by kind."""
    sizes = Sizes()
    checkpoint = make_checkpoint(folder / "base", shape=sizes.shape)
    adapters = make_adapters(checkpoint, folder / "adapters", adapter_specs(len(RANKS)))
    reference, asked = Reference(checkpoint, adapters), questions(list(adapters))
    side = make_vllm_side(side_name, sizes, len(adapters), 1024, python)
    with vllm_server(side, checkpoint, adapters, folder, folder / "server.log") as server:
        return {
            how: differences(asked, asyncio.run(answers(server.url, asked, together)), reference)
            for how, together in (("one at a time", False), ("all at once", True))
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    result = {**machine(), "vllm": installed_version(options.vllm_python)}
    for side_name in SIDES:
        with tempfile.TemporaryDirectory(prefix="check-vllm-") as folder:
            result[side_name] = measure(side_name, options.vllm_python, Path(folder))
        for how, kinds in result[side_name].items():
            for kind, row in kinds.items():
                counts = f"{row['different']} of {row['requests']} differ"
                print(f"{side_name}, {how}, {kind}: {counts}", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    replaced = result[SIDES[1]].values()
    return int(any(row["different"] for kinds in replaced for row in kinds.values()))


if __name__ == "__main__":
    raise SystemExit(main())
