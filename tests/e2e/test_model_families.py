"""Bases of other families answer as transformers + PEFT, without an adapter and with each.

FAMILIES_FULL=1 in the environment runs those too that differ little from what other tests serve.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client
from tests.harness.model_families import FAMILIES, VOCABULARY, Family, make_family
from tests.harness.server_flags import server_flags

SERVED = [each for each in FAMILIES if each.differs or "FAMILIES_FULL" in os.environ]


@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
async def test_model_family_answers_equal_those_of_transformers(
    family: Family, tmp_path: Path, logs: Path
) -> None:
    made = make_family(family, tmp_path)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 40, 90)]
    names = (None, *made.adapters)
    # The second time from the cache.
    questions = [(name, prompt) for _ in range(2) for name in names for prompt in prompts]
    flags = server_flags(made.checkpoint, made.adapters)
    log_path = logs / f"family-{family.model_type}.log"
    with ServerProcess(["--elora", "--elora-check", *flags], log_path=log_path) as server:
        async with Client(server.url) as client:
            answers = [await client.generate(*asked, num_tokens=16) for asked in questions]
    reference = made.reference()
    outputs = set()
    for (name, prompt), answer in zip(questions, answers, strict=True):
        output = list(answer.token_ids)
        expected = reference.generate(name, prompt, num_tokens=16)
        assert output == expected or reference.shortfall(name, prompt, output) < 1e-4, name
        outputs.add(tuple(output))
    assert len(outputs) > len(questions) / 4, "the answers say nothing"
    assert sum(answer.cached_tokens for answer in answers) > 300
