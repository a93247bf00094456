"""Bases of other families answer as transformers + PEFT, without an adapter and with each.

FAMILIES_FULL=1 in the environment runs those too that differ little from what other tests serve.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.multiprocessing
from safetensors.torch import load_file

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.model_families import FAMILIES, VOCABULARY, Family, make_family
from tests.harness.sent_adapters import PATH, sent
from tests.harness.server_flags import server_flags

SERVED = [each for each in FAMILIES if each.differs or "FAMILIES_FULL" in os.environ]


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")  # of output layers that are tied
@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
async def test_model_family_answers_equal_those_of_transformers(
    family: Family, tmp_path: Path, logs: Path
) -> None:
    if lacking := [program for program in family.programs if shutil.which(program) is None]:
        pytest.skip(f"needs {lacking}")
    made = make_family(family, tmp_path)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 40, 90)]
    names = (None, *made.adapters)
    questions = [(name, prompt) for name in names for prompt in prompts]
    questions += reversed(questions)  # now from the cache, as far as it is in a small pool
    flags = [*server_flags(made.checkpoint, made.adapters), *family.flags]
    log_path = logs / f"family-{family.name}.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        async with Client(server.url) as client:
            answers = [await client.generate(*asked, num_tokens=16) for asked in questions]
            for name, path in made.refused.items():
                body = {"lora_name": name, "lora_path": str(path)}
                refused = await client.post("/load_lora_adapter", body)
                assert refused.status_code == 400
                assert "--lora-target-modules" in refused.text
    reference = made.reference()
    outputs = set()
    for (name, prompt), answer in zip(questions, answers, strict=True):
        output = list(answer.token_ids)
        expected = reference.generate(name, prompt, num_tokens=16)
        assert output == expected or reference.shortfall(name, prompt, output) < 1e-4, name
        outputs.add(tuple(output))
    assert len(outputs) > len(questions) / 4, "the answers say nothing"
    assert sum(answer.cached_tokens for answer in answers) > family.least_cached


async def test_weights_for_the_image_encoder_are_dropped_if_asked(
    tmp_path: Path, logs: Path
) -> None:
    """An adapter on all linear layers of Qwen2.5-VL: refused by default; otherwise its answers to
    text are those of PEFT."""
    (family,) = [each for each in FAMILIES if each.model_type == "qwen2_5_vl"]
    made = make_family(replace(family, targets={"all": "all-linear"}), tmp_path)
    prompt = [random.Random(1).randrange(3, VOCABULARY) for _ in range(40)]
    flags = [*server_flags(made.checkpoint), "--max-lora-rank", "8"]
    flags += ["--lora-target-modules", "all"]
    torch.multiprocessing.set_sharing_strategy("file_system")
    for choice in ("refuse", "drop"):
        log_path = logs / f"tower-{choice}.log"
        args = ["--elora", "--elora-check", "--elora-tower-weights", choice, *flags]
        with ServerProcess(args, log_path=log_path) as server:
            async with Client(server.url) as client:
                body = {"lora_name": "all", "lora_path": str(made.adapters["all"])}
                loaded = await client.post("/load_lora_adapter", body)
                if choice == "refuse":
                    assert loaded.status_code == 400
                    assert "belongs to a vision or audio encoder" in loaded.text
                    continue
                assert loaded.status_code == 200, loaded.text
                answer = await client.generate("all", prompt, num_tokens=16)
                tensors = load_file(made.adapters["all"] / "adapter_model.safetensors")
                sent_too = await client.post(PATH, sent(made.adapters["all"], "sent", tensors))
                assert sent_too.status_code == 200, sent_too.text
                again = await client.generate("sent", prompt, num_tokens=16)
                state = (await client.get("/elora/state")).json()
    assert again.token_ids == answer.token_ids
    ours, theirs = (row["num_dropped_weights"] for row in state["adapters"])
    assert ours == theirs > 0
    assert "weights for a vision or audio encoder are not served" in log_path.read_text()
    output, reference = list(answer.token_ids), made.reference()
    expected = reference.generate("all", prompt, num_tokens=16)
    assert output == expected or reference.shortfall("all", prompt, output) < 1e-4
    assert expected != reference.generate(None, prompt, num_tokens=16)
