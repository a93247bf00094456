"""SGLang's offline engine: adapters come and go, more than may be loaded at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.harness.reference import Reference

PROGRAM = """
import json, sys

def main():
    import sglang
    from safetensors.torch import load_file

    given = json.loads(sys.argv[1])
    adapters, prompt = given["adapters"], given["prompt"]
    names = list(adapters)
    engine = sglang.Engine(
        model_path=given["checkpoint"], dtype="float32", max_total_tokens=8000,
        lora_paths={names[0]: adapters[names[0]]}, max_loaded_loras=3,
        max_lora_rank=64, lora_target_modules=["all"], log_level="error",
    )
    answers, facts = [], {}

    def ask(*names, **options):
        sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        options |= {"sampling_params": sampling, "lora_path": list(names)}
        found = engine.generate(input_ids=[prompt] * len(names), **options)
        answers.extend((name, each["output_ids"]) for name, each in zip(names, found))
        return found

    def load(name, **options):
        return engine.load_lora_adapter(name, adapters[name], **options)

    ask(None, names[0])
    facts["loaded"] = [load(name).success for name in names[1:]]  # more than three in all
    for name in names:
        ask(name)  # those that had to go come back
    ask(None, *names[:2])
    facts["unloaded"] = engine.unload_lora_adapter(names[1]).success
    try:
        ask(names[1])
    except ValueError as error:
        facts["asked for it"] = str(error)
    facts["loaded again"] = load(names[1], pinned=True).success
    ask(names[0], names[1])
    missing = engine.load_lora_adapter("missing", "/nowhere")
    facts["missing"] = [missing.success, missing.error_message]
    engine.unload_lora_adapter(names[0])
    tensors = load_file(f"{adapters[names[0]]}/adapter_model.safetensors")
    config = json.load(open(f"{adapters[names[0]]}/adapter_config.json"))
    facts["sent"] = engine.load_lora_adapter_from_tensors(names[0], tensors, config).success
    found = ask(names[0], names[1], return_logprob=True, logprob_start_len=0)
    facts["logprobs"] = [
        [logprob for logprob, *_ in each["meta_info"]["input_token_logprobs"][1:]] for each in found
    ]
    print("facts " + json.dumps([answers, facts]), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def run_of_engine(
    checkpoint: Path, adapters: dict[str, Path], prompts: Sequence[list[int]], tmp_path_factory: Any
) -> tuple[list[tuple[str | None, list[int]]], dict[str, Any]]:
    """Answers with the adapter of each, and what else the program says."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "program.py").write_text(PROGRAM)
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


def test_answers_equal_those_of_transformers(
    run_of_engine: Any, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    answers, _ = run_of_engine
    assert len(answers) == 13
    for name, output in answers:
        assert output == reference.generate(name, prompts[1], num_tokens=16), name


def test_adapters_come_and_go(run_of_engine: Any) -> None:
    _, facts = run_of_engine
    assert facts["loaded"] == [True] * 3 and facts["unloaded"] and facts["loaded again"]
    assert "mlp-r64" in facts["asked for it"] and facts["sent"]
    assert facts["missing"][0] is False and "/nowhere" in facts["missing"][1]


def test_logprobs_of_prompts_are_those_of_transformers(
    run_of_engine: Any, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    _, facts = run_of_engine
    for name, logprobs in zip(("all-r4", "mlp-r64"), facts["logprobs"], strict=True):
        expected = reference.logprobs(name, prompts[1])
        assert logprobs == pytest.approx(expected, abs=1e-4), name
