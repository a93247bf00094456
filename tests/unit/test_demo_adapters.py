"""The demo's adapters: what peft wrote, and that each one changes what the model says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_elora.testbed.adapters import (
    ALL_LINEAR,
    COVERAGE_NAMES,
    QUERY_VALUE,
    AdapterSpec,
    demo_adapters,
    make_adapters,
)


@pytest.fixture(scope="module")
def specs() -> list[AdapterSpec]:
    return demo_adapters()


@pytest.fixture(scope="module")
def paths(
    checkpoint: Path, specs: list[AdapterSpec], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return make_adapters(checkpoint, tmp_path_factory.mktemp("adapters"), specs)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(path / "adapter_model.safetensors")
    return loaded


def test_demo_covers_ranks_targets_and_scalings(specs: Sequence[AdapterSpec]) -> None:
    assert len(specs) == 16
    assert {spec.rank for spec in specs} == {8, 16, 24, 32, 48, 64}
    assert {spec.target_modules for spec in specs} == set(COVERAGE_NAMES)
    assert {spec.alpha == spec.rank for spec in specs} == {True, False}
    assert not any(spec.use_rslora for spec in specs)


def test_demo_adapter_names_stay_distinct_beyond_the_name_list() -> None:
    assert len({spec.name for spec in demo_adapters(40)}) == 40


def test_demo_adapter_config_equals_its_spec(
    paths: dict[str, Path], specs: Sequence[AdapterSpec]
) -> None:
    for spec in specs:
        config = json.loads((paths[spec.name] / "adapter_config.json").read_text())
        assert config["r"] == spec.rank
        assert config["lora_alpha"] == spec.alpha
        assert config["use_rslora"] == spec.use_rslora
        assert config["target_modules"] == sorted(spec.target_modules)


def test_demo_adapter_tensors_have_the_rank_and_no_zeros(
    paths: dict[str, Path], specs: Sequence[AdapterSpec]
) -> None:
    for spec in specs:
        weights = tensors(paths[spec.name])
        assert len(weights) == 2 * 4 * len(spec.target_modules)  # A and B, 4 layers
        for name, weight in weights.items():
            assert weight.shape[0 if "lora_A" in name else 1] == spec.rank
            assert weight.count_nonzero() > 0.99 * weight.numel()


def test_demo_adapter_of_the_same_spec_has_the_same_bytes(
    checkpoint: Path, paths: dict[str, Path], specs: Sequence[AdapterSpec], tmp_path: Path
) -> None:
    """In reverse order and on their own, so nothing leaks from one adapter to the next."""
    again = make_adapters(checkpoint, tmp_path, [specs[3], specs[0]])
    for name, path in again.items():
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (path / file).read_bytes() == (paths[name] / file).read_bytes()


def test_demo_adapter_is_rebuilt_when_its_spec_changes(checkpoint: Path, tmp_path: Path) -> None:
    before = AdapterSpec("a", rank=8, alpha=8, target_modules=QUERY_VALUE)
    after = AdapterSpec("a", rank=8, alpha=8, target_modules=QUERY_VALUE, seed=1)
    path = make_adapters(checkpoint, tmp_path, [before])["a"]
    old = tensors(path)
    make_adapters(checkpoint, tmp_path, [after])
    assert all(not torch.equal(old[name], new) for name, new in tensors(path).items())


def test_each_demo_adapter_changes_the_output(
    checkpoint: Path, paths: dict[str, Path], specs: Sequence[AdapterSpec]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("<|begin|><|user|>Hello<|end|><|assistant|>", return_tensors="pt")

    def answer(model: Any) -> tuple[int, ...]:
        return tuple(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist())

    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    answers = {answer(base)}
    for spec in specs:
        adapted = PeftModel.from_pretrained(base, paths[spec.name])
        answers.add(answer(adapted))
        base = adapted.unload()
    assert len(answers) == 1 + len(specs), "two adapters, or an adapter and the base, agree"


def test_demo_adapter_with_rslora_has_rank_stabilised_scaling(
    checkpoint: Path, tmp_path: Path
) -> None:
    from peft import PeftConfig

    spec = AdapterSpec("rs", rank=16, alpha=8, target_modules=ALL_LINEAR, use_rslora=True)
    path = make_adapters(checkpoint, tmp_path, [spec])["rs"]
    assert PeftConfig.from_pretrained(path).use_rslora
    assert spec.scaling == 2.0


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0}, {"target_modules": ()}, {"target_modules": ("qkv_proj",)}]
)
def test_invalid_adapter_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="adapter 'a'"):
        AdapterSpec(**{"name": "a", "rank": 8, "alpha": 8, "target_modules": QUERY_VALUE, **wrong})


def test_demo_adapters_refuse_duplicate_names(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        make_adapters(checkpoint, tmp_path, demo_adapters(1) * 2)
