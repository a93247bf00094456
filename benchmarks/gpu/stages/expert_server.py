"""Stage 12: a server with CUDA graphs and adapters on the experts of a small Qwen3-MoE model.

Its answers are compared with those of ``elora_torch``, and with transformers and PEFT in float32.
Every row is routed to all experts: a router in bfloat16 may choose others than one in float32, and
answers then differ by several units of log-probability. SGLang's kernel for experts has no float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.stages.served import (
    STEP_S,
    Base,
    compare,
    graphs_in,
    questions,
    read_answers,
    serve_and_ask,
    torch_step,
)
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict
from tests.harness.model_families import FAMILIES, VOCABULARY, Made, make_family

MOST_SHORT = 0.5
"""Most that the logit of a token may lie below the highest one in float32. Raising it hides small
errors. Rounding to bfloat16 by transformers on a CPU made it 0.18 at most."""

TOLERANCE = 0.5
"""As ``served.TOLERANCE``. That rounding changed log-probabilities by 0.19 at most, and either
server may be off by as much."""

(QWEN3,) = (family for family in FAMILIES if family.name == "Qwen3-MoE")
FAMILY = replace(
    QWEN3,
    options={**QWEN3.options, "head_dim": 64, "num_experts_per_tok": QWEN3.options["num_experts"]},
)


def made(context: Context) -> Made:
    """The checkpoint and its adapters, made by the stage's first step that asks."""
    folder = context.models / "experts"
    if not folder.exists():
        folder.mkdir(parents=True)
        make_family(FAMILY, folder)
    checkpoint = folder / "checkpoint"
    adapters = {path.name: path for path in sorted(folder.iterdir()) if path != checkpoint}
    return Made(checkpoint, adapters, {}, FAMILY)


def served_adapters(context: Context) -> tuple[Path, dict[str, Path]]:
    """The checkpoint and the adapters that are served: all, or one in a dry run."""
    found = made(context)
    names = ["all"] if context.dry_run else list(found.adapters)
    return found.checkpoint, {name: found.adapters[name] for name in names}


EXPERTS = Base(
    served_adapters,
    VOCABULARY,
    flags=("--lora-target-modules", "all", "--max-lora-rank", "16"),
    gpu_flags=("--moe-runner-backend", "triton"),
)


def graphs(context: Context) -> Verdict:
    verdict = serve_and_ask(context, "graphs", "elora_triton", (), EXPERTS)
    found = graphs_in((context.work / "graphs.server.log").read_text(errors="replace"))
    verdict.facts |= found
    if not context.dry_run:  # a CPU has no graphs
        verdict.right["decode graphs were captured and replayed"] = found["decode_replayed"]
    return verdict


def peft(context: Context) -> Verdict:
    """Check that each token served with graphs has about the highest logit in float32."""
    reference = made(context).reference()
    asked = [question for batch in questions(context, EXPERTS) for question in batch]
    answers = read_answers(context, "graphs")
    worst = {
        name or "base": max(
            reference.shortfall(name, prompt, answer["ids"])
            for (other, prompt), answer in zip(asked, answers, strict=True)
            if other == name
        )
        for name in {name for name, _ in asked}
    }
    right = {"graphs answers as transformers and PEFT": max(worst.values()) <= MOST_SHORT}
    return Verdict(right, {"worst logit below the highest, by adapter": worst})


STEPS = (
    torch_step(EXPERTS),
    Step("graphs", STEP_S, graphs, interpreted=True),
    Step("compare", 20, lambda context: compare(context, "graphs", "elora_torch", TOLERANCE)),
    Step("peft", 60, peft),
)
