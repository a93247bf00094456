"""Servers with a small model in bfloat16, and comparison of two servers' answers."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages.stage_run import Context, Step, Verdict
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess
from tests.harness.adapter_specs import SPECS
from tests.harness.client import Client, run
from tests.harness.server_flags import server_flags

SHAPE = ModelShape(num_heads=4, num_kv_heads=2, head_dim=64)  # FlashInfer has no smaller head
EAGER = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
TOLERANCE = 0.25
"""Log-probability. Two servers in bfloat16 may differ by this much in a token's; raising it hides
small errors, a wrong adapter differs by several units."""

LEAST_EQUAL = 0.6
"""Share of equal tokens. Rounding may turn a near tie, and what follows a turn is not compared."""

START_S = 150
"""Seconds that a server may take to start; compilation of kernels is the larger part."""

STEP_S = 200


def base_and_adapters(context: Context) -> tuple[Path, dict[str, Path]]:
    """The checkpoint and its adapters, made by the stage's first step that asks."""
    checkpoint = make_checkpoint(context.models / "base", shape=SHAPE)
    specs = SPECS if not context.dry_run else SPECS[2:3]
    return checkpoint, make_adapters(checkpoint, context.models / "adapters", specs)


@dataclass(frozen=True, slots=True)
class Base:
    """A small model that is served.

    Args:
        make: Returns its checkpoint and its adapters, which the stage's first step makes.
        num_tokens: Tokens of its vocabulary that prompts may have.
        flags: That a server needs for it.
        gpu_flags: That a server needs for it on a GPU.
    """

    make: Callable[[Context], tuple[Path, dict[str, Path]]]
    num_tokens: int
    flags: tuple[str, ...] = ()
    gpu_flags: tuple[str, ...] = ()


LLAMA = Base(base_and_adapters, num_tokens=2000)


def device_flags(context: Context) -> list[str]:
    """Flags that name a GPU's backends; the CPU platform chooses its own."""
    if context.dry_run:
        return []
    attention = context.options.get("attention", "triton")
    backends = ("--sampling-backend", "pytorch", "--grammar-backend", "none")
    return ["--attention-backend", attention, *backends]


def start_s(context: Context) -> int:
    """Seconds that a server may take to start here; a loaded CPU machine takes longer."""
    return START_S * (3 if context.dry_run else 1)


def elora_server(
    context: Context,
    name: str,
    lora: str,
    flags: Sequence[str],
    base: Base = LLAMA,
    **extra: Any,
) -> ServerProcess:
    """A server whose log lies in ``work``, with all adapters and the given LoRA backend."""
    checkpoint, adapters = base.make(context)
    command = ["--elora", "--elora-check", "--lora-backend", lora]
    command += [*server_flags(checkpoint, adapters), "--dtype", "bfloat16", *base.flags]
    command += base.gpu_flags if not context.dry_run else ()
    command += [*device_flags(context), *flags]
    log_path = context.work / f"{name}.server.log"
    return ServerProcess(
        command,
        log_path=log_path,
        program=ELORA_SERVER,
        startup_timeout_s=start_s(context),
        **extra,
    )


def prompts(context: Context, base: Base = LLAMA) -> list[list[int]]:
    rng = random.Random(0)
    lengths = (5,) if context.dry_run else (7, 60, 300)
    return [[rng.randrange(3, base.num_tokens) for _ in range(length)] for length in lengths]


async def tokens(
    client: Client, adapter: str | None, prompt: list[int], number: int, **extra: Any
) -> Any:
    """``{"ids", "logprobs", "cached"}`` of one greedy answer."""
    sampling = {"temperature": 0, "max_new_tokens": number, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, **extra}
    answer = await client.post("/generate", body | ({"lora_path": adapter} if adapter else {}))
    assert answer.status_code == 200, answer.text
    read = answer.json()
    logprobs = [value for value, *_ in read["meta_info"]["output_token_logprobs"]]
    cached = read["meta_info"]["cached_tokens"]
    return {"ids": read["output_ids"], "logprobs": logprobs, "cached": cached}


def questions(context: Context, base: Base = LLAMA) -> list[list[tuple[str | None, list[int]]]]:
    """Batches of questions, each an adapter and a prompt: every prompt with the base model and with
    each adapter, then all of it again."""
    _, adapters = base.make(context)
    names = (None, *adapters)
    return [[(name, prompt) for name in names] for prompt in prompts(context, base) * 2]


def serve_and_ask(
    context: Context, name: str, lora: str, flags: Sequence[str], base: Base = LLAMA
) -> Verdict:
    """Send every prompt with every adapter in one batch, then again with cached KV."""
    batches = questions(context, base)
    number = 3 if context.dry_run else 16

    async def work(client: Client) -> list[Any]:
        found: list[Any] = []
        for batch in batches:
            asked = (tokens(client, adapter, prompt, number) for adapter, prompt in batch)
            found += await asyncio.gather(*asked)
        return found

    with elora_server(context, name, lora, flags, base) as server:
        found = run(server.url, work)
    write_answers(context, name, found)
    cached = sum(answer["cached"] for answer in found[len(found) // 2 :])
    return Verdict({f"{name}: the second round finds its KV": cached > 0}, {"answers": len(found)})


def write_answers(context: Context, name: str, answers: list[Any]) -> None:
    (context.work / f"{name}.answers.json").write_text(json.dumps(answers))


def read_answers(context: Context, name: str) -> list[Any]:
    """The answers of a server that an earlier step wrote to ``work``."""
    found: list[Any] = json.loads((context.work / f"{name}.answers.json").read_text())
    return found


def graphs_in(log: str) -> dict[str, Any]:
    """Which CUDA graphs a server's log says were captured, and whether batches replayed them."""
    return {
        "captured": sorted(set(re.findall(r"Capture ([\w -]+?) (?i:cuda) graph begin", log))),
        "decode_replayed": bool(re.search(r"Decode batch.*graph: True", log)),
        "prefill_replayed": bool(re.search(r"Prefill batch.*graph: True", log)),
    }


def agreement(one: list[Any], other: list[Any], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Measures of agreement between two lists of answers.

    Tokens of a pair are compared up to the first difference; there the two log-probabilities must
    be close, because rounding can only change the order of near ties.
    """
    equal = compared = 0
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        pairs = zip(a["ids"], b["ids"], a["logprobs"], b["logprobs"], strict=True)
        for id_a, id_b, logprob_a, logprob_b in pairs:
            compared += 1
            worst = max(worst, abs(logprob_a - logprob_b))
            if id_a != id_b:
                break
            equal += 1
    total = sum(len(a["ids"]) for a in one)
    share = equal / total if total else 0.0
    return {
        "share_equal": round(share, 4),
        "compared": compared,
        "worst_logprob": round(worst, 4),
        "agree": share >= LEAST_EQUAL and worst <= tolerance,
    }


def compare(context: Context, one: str, other: str, tolerance: float = TOLERANCE) -> Verdict:
    """Compare the answers that two steps wrote to ``work``."""
    answers = [read_answers(context, name) for name in (one, other)]
    found = agreement(*answers, tolerance)
    return Verdict({f"{one} answers as {other}": found["agree"]}, found)


def torch_step(base: Base = LLAMA) -> Step:
    """The server that others are compared with: eager, LoRA in PyTorch."""
    return Step(
        "elora_torch", STEP_S, lambda c: serve_and_ask(c, "elora_torch", "elora_torch", EAGER, base)
    )
