"""SGLang's offline engine: adapters are loaded and unloaded, more than fit at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.programs import source
from tests.harness.reference import Reference

pytestmark = pytest.mark.slow  # one engine, which starts and runs for a minute


@pytest.fixture(scope="module")
def run_of_engine(
    checkpoint: Path, adapters: dict[str, Path], prompts: Sequence[list[int]], tmp_path_factory: Any
) -> tuple[list[tuple[str | None, list[int]]], dict[str, Any]]:
    """Return the answers with their adapters, and the other facts that the program prints."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "program.py").write_text(source("offline_engine"))
    names = ("all-r4", "mlp-r64", "attention-r24", "rslora-r8")
    given = {
        "checkpoint": str(checkpoint),
        "adapters": {name: str(adapters[name]) for name in names},
        "prompt": prompts[1],
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "program.py", json.dumps(given)],
        cwd=folder,
        env={**environment, "SGLANG_ELORA": "1", "SGLANG_ELORA_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("facts ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    answers, facts = json.loads(lines[0].removeprefix("facts "))
    return answers, facts


def test_engine_answers_equal_those_of_transformers(
    run_of_engine: Any, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    answers, _ = run_of_engine
    assert len(answers) == 13
    for name, output in answers:
        assert output == reference.generate(name, prompts[1], num_tokens=16), name


def test_engine_loads_and_unloads_adapters(run_of_engine: Any) -> None:
    _, facts = run_of_engine
    assert facts["loaded"] == [True] * 3 and facts["unloaded"] and facts["loaded again"]
    assert "mlp-r64" in facts["asked for it"] and facts["sent"]
    assert facts["missing"][0] is False and "/nowhere" in facts["missing"][1]


def test_engine_prompt_logprobs_equal_those_of_transformers(
    run_of_engine: Any, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    _, facts = run_of_engine
    for name, logprobs in zip(("all-r4", "mlp-r64"), facts["logprobs"], strict=True):
        expected = reference.logprobs(name, prompts[1])
        assert logprobs == pytest.approx(expected, abs=1e-4), name
