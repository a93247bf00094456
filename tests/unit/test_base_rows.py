"""Copies of the base model's embeddings in adapters: equal ones are skipped, others refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from sglang_elora.adapters import AdapterError, BaseShapes, check_adapter, check_tensors
from sglang_elora.adapters.base_rows import BaseRows
from tests.harness.peft_adapters import (
    HIDDEN,
    VOCAB,
    edit_tensors,
    save_adapter,
    tiny_config,
)

EMBEDDING = torch.arange(VOCAB * HIDDEN, dtype=torch.float32).view(VOCAB, HIDDEN) / 7


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"model.embed_tokens.weight": EMBEDDING}, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": EMBEDDING + 1}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_equal_copy_has_no_difference_in_any_dtype(base_folder: Path) -> None:
    rows = BaseRows(base_folder)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert rows.difference("embed_tokens", EMBEDDING.to(dtype)) is None
        assert rows.difference("lm_head", (EMBEDDING + 1).to(dtype)) is None


@pytest.mark.parametrize("row", [0, 5000, VOCAB - 1])
def test_first_row_that_differs_is_named(base_folder: Path, row: int) -> None:
    big = torch.ones(9000, 4)
    save_file({"model.embed_tokens.weight": big}, base_folder / "model-00001-of-00002.safetensors")
    changed = big.clone()
    changed[row, 2] = 1.01
    changed[-1, 0] = float("nan")
    found = BaseRows(base_folder).difference("embed_tokens", changed)
    assert found is not None and found.startswith(f"row {row} differs from the base model's")


def test_resized_copy_is_told_from_a_trained_one(base_folder: Path) -> None:
    grown = torch.cat([EMBEDDING, EMBEDDING[:8]])
    found = BaseRows(base_folder).difference("embed_tokens", grown)
    assert (
        found == f"its shape is [{VOCAB + 8}, {HIDDEN}], the base model's [{VOCAB}, {HIDDEN}]: "
        "it was resized"
    )


def test_tied_output_layer_is_compared_with_the_embedding(tmp_path: Path) -> None:
    save_file({"transformer.embed_tokens.weight": EMBEDDING}, tmp_path / "model.safetensors")
    assert BaseRows(tmp_path).difference("lm_head", EMBEDDING) is None


@pytest.mark.parametrize("folder", [None, Path("nowhere")])
def test_without_the_bases_files_nothing_is_equal(folder: Path | None) -> None:
    found = BaseRows(folder).difference("lm_head", EMBEDDING)
    assert found is not None and "cannot be compared" in found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_request", [False, True])
def test_adapter_with_unchanged_copies_passes_and_with_a_changed_row_does_not(
    tmp_path: Path, by_request: bool
) -> None:
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(tiny_config("Llama")).save_pretrained(
        tmp_path / "model"
    )
    base = BaseShapes.from_pretrained(str(tmp_path / "model"))
    folder = save_adapter(tmp_path / "x")
    weights = {}

    def add(tensors: dict[str, torch.Tensor]) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        tensors["base_model.model.model.embed_tokens.weight"] = (
            model.model.embed_tokens.weight.detach()
        )
        tensors["base_model.model.lm_head.weight"] = model.lm_head.weight.detach()
        weights.update(tensors)

    edit_tensors(folder, add)

    def check() -> int:
        if not by_request:
            return check_adapter("a", str(folder), base).num_parameters
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        return check_tensors("a", config, weights, base).num_parameters

    alone = check_adapter("a", str(save_adapter(tmp_path / "y")), base).num_parameters
    assert check() == alone

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.lm_head.weight"][3] *= 1.1
        weights.update(tensors)

    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match=r"lm_head.weight is a saved embedding.*row 3 differs"):
        check()


@pytest.mark.filterwarnings("ignore")
def test_many_copies_are_refused_without_reading_them(tmp_path: Path, base: BaseShapes) -> None:
    folder = save_adapter(tmp_path / "x")
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {f"base_model.model.m{i}.embed_tokens.weight": EMBEDDING.clone() for i in range(5)}
        ),
    )
    with pytest.raises(AdapterError, match="more than 4 copies of embeddings"):
        check_adapter("a", str(folder), replace(base))
