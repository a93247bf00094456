"""The demo checkpoint: reproducible, built once, and with output worth comparing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_elora.testbed.build_once import MANIFEST_NAME, build_once
from sglang_elora.testbed.checkpoint import Architecture, ModelShape, make_checkpoint

PROMPTS = (
    "Hello",
    "Please answer the question.",
    "There are 20 cups in the kitchen.",
    "Why is the sea blue?",
    "a",
)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]], length: int) -> list[int]:
    """Token ids of the greedy answer to ``messages``."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    answer: list[int] = output[0, prompt["input_ids"].shape[1] :].tolist()
    return answer


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_checkpoint_of_the_same_arguments_has_the_same_bytes(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert digests(make_checkpoint(tmp_path / "again")) == digests(checkpoint)


def test_checkpoint_seed_changes_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    other = digests(make_checkpoint(tmp_path / "other", seed=1))
    assert other["model.safetensors"] != digests(checkpoint)["model.safetensors"]
    assert other["config.json"] == digests(checkpoint)["config.json"]


def test_make_checkpoint_writes_nothing_if_up_to_date(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"untouched")
    make_checkpoint(directory)
    assert (directory / "model.safetensors").read_bytes() == b"untouched"


def test_checkpoint_is_rebuilt_when_parameters_change(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model")
    before = digests(directory)
    make_checkpoint(directory, dtype="bfloat16")
    assert digests(directory)["model.safetensors"] != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "drafts were left behind"


def test_make_checkpoint_refuses_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not made by the demo"):
        make_checkpoint(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_failed_build_keeps_the_previous_result(tmp_path: Path) -> None:
    directory = build_once(tmp_path / "d", {"v": 1}, lambda draft: None)

    def fail(draft: Path) -> None:
        (draft / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(directory, {"v": 2}, fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["d", MANIFEST_NAME]


@pytest.mark.parametrize("shape", [{"num_heads": 6}, {"head_dim": 64}])
def test_invalid_model_shape_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must equal|not a multiple"):
        ModelShape(**shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_checkpoint_greedy_output_is_not_degenerate(
    architecture: Architecture, models: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_checkpoint(models / f"{architecture}-demo", architecture=architecture)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    answers = [greedy(model, tokenizer, user(prompt), 32) for prompt in PROMPTS]
    for answer in answers:
        assert len(answer) == 32, "the end token came early"
        assert len(set(answer)) >= 8
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_chat_history_encodes_to_the_tokens_already_processed(
    checkpoint: Path, tokenizer: Any
) -> None:
    """Otherwise a second turn could reuse no KV of the first one's answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    first = user(PROMPTS[1])
    answer = greedy(model, tokenizer, first, 48)
    seen = tokenizer.apply_chat_template(first, add_generation_prompt=True)["input_ids"] + answer
    second = [
        *first,
        {"role": "assistant", "content": tokenizer.decode(answer)},
        *user(PROMPTS[2]),
    ]
    prompt = tokenizer.apply_chat_template(second, add_generation_prompt=True)["input_ids"]
    assert prompt[: len(seen)] == seen


def test_checkpoint_weights_have_the_requested_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    directory = make_checkpoint(tmp_path / "model", dtype="bfloat16")
    dtypes = {weight.dtype for weight in load_file(directory / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
