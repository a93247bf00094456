"""Every kind of adapter that PEFT saves: served with the answers of HF + PEFT, or refused.

PEFT_FULL=1 in the environment runs all kinds in further ways to serve.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from sglang_elora.testbed.server import ServerProcess
from tests.harness import peft_kinds
from tests.harness.client import Client
from tests.harness.model_families import FAMILIES, make_family
from tests.harness.peft_adapters import WEIGHTS
from tests.harness.reference import Reference
from tests.harness.sent_adapters import PATH, sent
from tests.harness.server_flags import server_flags

POOL_SLOTS = 1400
"""On one rank; two ranks have half of the heads in a slot, and not half of an adapter."""
LOGITS_IN_PASSES = {"SGLANG_ENABLE_LOGPROB_CHUNK": "true", "SGLANG_LOGPROB_CHUNK_SIZE": "32"}
MODES = {
    "plain": (),
    "drafted-ngrams": ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4"),
    "preemptions": ("--enable-priority-scheduling", "--max-running-requests", "4"),
    "tokenizer-workers": ("--tokenizer-worker-num", "2"),
    "tensor-parallel": ("--tp-size", "2"),
}
"""Flags of ways to serve in which all kinds answer the same."""
TESTED = [("dense", "plain"), ("experts", "tensor-parallel")]
if "PEFT_FULL" in os.environ:
    TESTED = list(product(["dense", "experts"], MODES))


@dataclass(frozen=True)
class Kinds:
    """A checkpoint, and all kinds of adapters that PEFT saves for such a model."""

    checkpoint: Path
    served: dict[str, Path]
    refused: dict[str, Path]
    reasons: dict[str, str]
    truth: Reference


@pytest.fixture(scope="module")
def dense(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A model without experts."""
    folder = tmp_path_factory.mktemp("kinds")
    served = peft_kinds.make(checkpoint, folder, peft_kinds.SERVED)
    refused = peft_kinds.make(checkpoint, folder, peft_kinds.REFUSED)
    reasons = {name: reason for name, (_, reason) in peft_kinds.REFUSED.items()}
    return Kinds(checkpoint, served, refused, reasons, Reference(checkpoint, served))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A model with experts."""
    (family,) = [family for family in FAMILIES if family.name == "Qwen3-MoE"]
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = make_family(replace(family, targets={}, per_expert=()), folder).checkpoint
    served = peft_kinds.make(checkpoint, folder, peft_kinds.SERVED_EXPERTS)
    refused = peft_kinds.make(checkpoint, folder, peft_kinds.REFUSED_EXPERTS)
    reasons = {name: reason for name, (_, reason) in peft_kinds.REFUSED_EXPERTS.items()}
    known = dict(served)
    for name in peft_kinds.EACH_EXPERT:
        served[name] = peft_kinds.make_each_expert(folder / name, name)
        # PEFT loads no adapter with a part of the experts.
        known[name] = peft_kinds.make_each_expert(folder / f"{name}-whole", name, whole=True)
    return Kinds(checkpoint, served, refused, reasons, Reference(checkpoint, known))


@pytest.fixture(scope="module", params=[("dense", "plain")], ids="-".join)
def world(request: pytest.FixtureRequest) -> tuple[Kinds, str]:
    """The kinds of adapters, and the way to serve them."""
    kinds, mode = request.param
    return request.getfixturevalue(kinds), mode


@pytest.fixture(scope="module")
def kinds(world: tuple[Kinds, str]) -> Kinds:
    return world[0]


@pytest.fixture(scope="module")
def server(world: tuple[Kinds, str], logs: Path) -> Iterator[ServerProcess]:
    """Half of the adapters are given at start; the pool holds a few of them."""
    kinds, mode = world
    if mode == "drafted-ngrams" and not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("SGLang compiles its tables of n-grams with g++ and ninja")
    at_start = dict(list(kinds.served.items())[::2])
    num_ranks = 2 if "--tp-size" in MODES[mode] else 1
    flags = [*server_flags(kinds.checkpoint, at_start)]
    flags += ["--max-total-tokens", str(num_ranks * POOL_SLOTS)]
    flags += ["--max-lora-rank", "64", "--lora-target-modules", "all", *MODES[mode]]
    log_path = logs / f"peft-options-{kinds.checkpoint.parent.name}-{mode}.log"
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if num_ranks == 2 else LOGITS_IN_PASSES
    flags = ["--elora", "--elora-check", "--elora-check-streams", "latest", *flags]
    with ServerProcess(flags, log_path=log_path, env=env) as server:
        yield server


async def first_logprob(client: Client, name: str, prompt: Sequence[int]) -> tuple[int, float]:
    """The first token of the answer and its log-probability."""
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    body = {"input_ids": list(prompt), "lora_path": name, "sampling_params": sampling}
    answer = (await client.post("/generate", {**body, "return_logprob": True})).json()
    logprob, token, *_ = answer["meta_info"]["output_token_logprobs"][0]
    return token, logprob


@pytest.mark.parametrize("world", TESTED, indirect=True, ids="-".join)
async def test_served_kinds_answer_as_peft_alone_and_under_pressure(
    server: ServerProcess, client: Client, kinds: Kinds
) -> None:
    rng, served, truth = random.Random(0), kinds.served, kinds.truth
    prompts = [[rng.randrange(3, 600) for _ in range(length)] for length in (6, 40, 90)]
    for name, path in list(served.items())[1::2]:
        body = {"lora_name": name, "lora_path": str(path)}
        loaded = await client.post("/load_lora_adapter", body)
        assert loaded.status_code == 200, loaded.text
    for name in served:
        token, logprob = await first_logprob(client, name, prompts[0])
        expected = truth.logprobs(name, [*prompts[0], token])[-1]
        assert logprob == pytest.approx(expected, abs=1e-4), name
    requests = [(name, prompt) for _ in range(2) for prompt in prompts for name in served]
    has_priorities = "--enable-priority-scheduling" in server.command
    answers = await asyncio.gather(
        *(
            client.generate(*request, priority=rng.randrange(100) if has_priorities else None)
            for request in requests
        )
    )
    for (name, prompt), answer in zip(requests, answers, strict=True):
        output = list(answer.token_ids)
        if output != truth.generate(name, prompt):  # rounding decides between two tokens
            assert truth.shortfall(name, prompt, output) < 1e-4, name
    assert len({answer.token_ids for answer in answers}) > len(served), "the answers say nothing"
    found = (await client.get("/server_info")).json()["internal_states"][0]["elora"]
    assert found["adapter_evictions"] > 0 and found["checks"] > 0, "the pool was too large"


async def test_logprobs_of_prompts_are_those_of_peft_in_one_batch(
    client: Client, dense: Kinds
) -> None:
    """Prompts of several adapters at once: the output layer gets all rows, in several passes."""
    rng = random.Random(1)
    asked = [
        (name, [rng.randrange(3, 600) for _ in range(length)])
        for name in ("head-and-all", "plain", "head")
        for length in (20, 70)
    ]
    answers = await asyncio.gather(
        *(
            client.post(
                "/generate",
                {
                    "input_ids": prompt,
                    "lora_path": name,
                    "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                    "return_logprob": True,
                    "logprob_start_len": 0,
                },
            )
            for name, prompt in asked
        )
    )
    for (name, prompt), answer in zip(asked, answers, strict=True):
        found = answer.json()["meta_info"]["input_token_logprobs"]
        logprobs = [logprob for logprob, *_ in found[1:]]  # the first token has none
        assert logprobs == pytest.approx(dense.truth.logprobs(name, prompt), abs=1e-4), name


@pytest.mark.parametrize("world", [("experts", "tensor-parallel")], indirect=True, ids="-".join)
async def test_weights_of_experts_may_be_sent_in_a_request(client: Client, kinds: Kinds) -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    for name in ("experts-and-all", "some-experts"):
        tensors = load_file(kinds.served[name] / WEIGHTS)
        other = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}
        for first, second in ((tensors, None), (tensors, {}), ({}, tensors), (tensors, other)):
            bodies = [
                sent(kinds.served[name], f"sent-{name}", each) for each in (first, second or {})
            ]
            payloads = [body["serialized_named_tensors"][0] for body in bodies]
            body = bodies[0] | {"serialized_named_tensors": payloads[: 1 + (second is not None)]}
            refused = await client.post(PATH, body)
            assert refused.status_code == 400, refused.text
        body = sent(kinds.served[name], f"sent-{name}", tensors)
        body["serialized_named_tensors"] *= 2  # for each rank
        loaded = await client.post(PATH, body)
        assert loaded.status_code == 200, loaded.text
        answer = await client.generate(f"sent-{name}", [5, 6, 7])
        assert list(answer.token_ids) == kinds.truth.generate(name, [5, 6, 7])


@pytest.mark.parametrize(
    "world", [("dense", "plain"), ("experts", "tensor-parallel")], indirect=True, ids="-".join
)
async def test_other_kinds_are_refused_with_the_reason(client: Client, kinds: Kinds) -> None:
    for name, path in kinds.refused.items():
        body = {"lora_name": name, "lora_path": str(path)}
        refused = await client.post("/load_lora_adapter", body)
        assert refused.status_code == 400, name
        assert kinds.reasons[name] in refused.json()["error_message"]
        assert str(path) in refused.json()["error_message"]


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
async def test_adapter_with_a_changed_row_of_an_embedding_is_refused(
    client: Client, dense: Kinds, module: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dense.served["copies"], tmp_path / "changed"))
    tensors = load_file(folder / WEIGHTS)
    (name,) = [name for name in tensors if name.endswith(f"{module}.weight")]
    tensors[name][17, 3] += 1e-3
    save_file(tensors, folder / WEIGHTS)
    body = {"lora_name": "changed", "lora_path": str(folder)}
    refused = await client.post("/load_lora_adapter", body)
    assert refused.status_code == 400
    assert f"{module}.weight is a saved embedding, not served: row 17 differs" in refused.text
    answer = await client.generate("plain", [5, 6, 7])
    assert list(answer.token_ids) == dense.truth.generate("plain", [5, 6, 7])
