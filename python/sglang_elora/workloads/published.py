"""Published workload generators, reimplemented to produce our traces."""

from __future__ import annotations

import random

from sglang_elora.workloads.generate import adapter_name, draw_tokens, in_order, lognormal
from sglang_elora.workloads.popularity import Law, draw
from sglang_elora.workloads.trace import Session, Trace, Turn
from sglang_elora.workloads.workload import Recorded

VOCAB_SIZE = 2048


def slora(
    num_adapters: int,
    *,
    alpha: float = 1.0,
    requests_per_s: float = 2.0,
    cv: float = 1.0,
    input_range: tuple[int, int] = (8, 512),
    output_range: tuple[int, int] = (8, 512),
    duration_s: float = 300.0,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> Trace:
    """S-LoRA's synthetic workload: single requests, no shared prompts.

    Source: Sheng et al., "S-LoRA" (MLSys 2024), section 7.1, and its ``benchmarks/trace.py``:
    adapters by a power law of exponent ``alpha``, gaps between requests Gamma with coefficient of
    variation ``cv``, lengths uniform. The defaults are the paper's.
    """
    rng = random.Random(f"slora/{seed}")
    shape = cv**-2
    gap_s = 1 / (shape * requests_per_s)
    sessions: list[Session] = []
    moment_s = rng.gammavariate(shape, gap_s)
    while moment_s < duration_s:
        adapter = adapter_name(draw(Law.POWER, alpha, num_adapters, len(sessions), rng))
        prompt = draw_tokens(rng, rng.randint(*input_range), vocab_size)
        turn = Turn(prompt, rng.randint(*output_range), 0.0)
        sessions.append(Session(len(sessions), adapter, moment_s, (), (turn,)))
        moment_s += rng.gammavariate(shape, gap_s)
    about = Recorded("slora", "", f"alpha={alpha} cv={cv} adapters={num_adapters}")
    return Trace(about, seed, requests_per_s, duration_s, tuple(sessions))


def shared_prefix(
    num_adapters: int,
    *,
    num_groups: int = 64,
    prompts_per_group: int = 16,
    system_tokens: int = 2048,
    question_tokens: int = 128,
    output_tokens: int = 256,
    turns: int = 1,
    think_s: float = 0.0,
    spread: float = 0.0,
    prompts_per_s: float = 4.0,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> Trace:
    """A trace like ``generated-shared-prefix``: groups of prompts with one system prompt each.

    Source: SGLang's ``bench_serving``, with its defaults. Groups are assigned to adapters
    round-robin. Prompts arrive in random order as a Poisson process, each as a session of ``turns``
    questions. ``spread`` is the standard deviation of the logarithm of lengths.
    """
    rng = random.Random(f"shared_prefix/{seed}")
    systems = [draw_tokens(rng, system_tokens, vocab_size) for _ in range(num_groups)]
    groups = [group for group in range(num_groups) for _ in range(prompts_per_group)]
    rng.shuffle(groups)
    sessions: list[Session] = []
    moment_s = 0.0
    for number, group in enumerate(groups):
        moment_s += rng.expovariate(prompts_per_s)
        said = tuple(
            Turn(
                draw_tokens(rng, lognormal(rng, question_tokens, spread), vocab_size),
                lognormal(rng, output_tokens, spread),
                rng.expovariate(1 / think_s) if i and think_s else 0.0,
            )
            for i in range(turns)
        )
        adapter = adapter_name(group % num_adapters)
        sessions.append(Session(number, adapter, moment_s, systems[group], said))
    about = Recorded("shared_prefix", "", f"groups={num_groups} adapters={num_adapters}")
    end_s = moment_s + turns * (think_s + 1.0)
    return Trace(about, seed, turns * prompts_per_s, end_s, in_order(sessions))
