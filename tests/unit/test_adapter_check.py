"""Adapters that pass the check, the facts it returns, and the server's limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_elora.adapters import AdapterFacts, BaseShapes, check_adapter, read_adapter
from tests.harness.peft_adapters import (
    ALL_LINEAR,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    RANK,
    VOCAB,
    WEIGHTS,
    Tensors,
    assert_in,
    edit_config,
    edit_tensors,
    refusal,
    save_adapter,
    tiny_config,
)


# Adapters that must pass
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_check_accepts_an_adapter_of_each_family(family: str, tmp_path: Path) -> None:
    base = BaseShapes.from_config(tiny_config(family))
    assert base.known and base.num_layers == LAYERS and base.vocab_size == VOCAB
    folder = save_adapter(tmp_path / family, family)
    facts = check_adapter("a", str(folder), base, max_rank=RANK, target_modules={"all"})
    assert facts.modules == frozenset(ALL_LINEAR)
    assert facts.rank == RANK and facts.scaling == 2.0


def test_adapter_check_returns_the_adapters_facts(saved: Path, base: BaseShapes) -> None:
    per_layer = 2 * (HIDDEN + 64) + 2 * (HIDDEN + 32) + 3 * (HIDDEN + INTERMEDIATE)
    parameters = LAYERS * RANK * per_layer
    assert check_adapter("a", str(saved), base) == AdapterFacts(
        name="a",
        folder=saved,
        files=(saved / WEIGHTS,),
        rank=RANK,
        alpha=8.0,
        scaling=2.0,
        modules=frozenset(ALL_LINEAR),
        num_parameters=parameters,
        size_bytes=4 * parameters,
    )


def test_adapter_check_computes_the_rslora_scaling(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, use_rslora=True)
    assert check_adapter("a", str(adapter), base).scaling == pytest.approx(8 / math.sqrt(RANK))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"rank_pattern": {"lm_head": 64}, "alpha_pattern": {"q_proj": 8}},
        {"bias": "all"},  # this base has no biases, so none are saved
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_adapter_check_accepts_unusual_but_valid_options(
    options: dict[str, Any], tmp_path: Path, base: BaseShapes
) -> None:
    facts = check_adapter("a", str(save_adapter(tmp_path / "x", **options)), base)
    assert facts.num_parameters > 0


@pytest.mark.filterwarnings("ignore")
def test_adapter_check_ignores_frozen_embedding_copies(tmp_path: Path, base: BaseShapes) -> None:
    folder = save_adapter(tmp_path / "x", target_modules=["embed_tokens"])
    names: list[str] = []
    edit_tensors(folder, names.extend)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in names
    facts = check_adapter("a", str(folder), base, target_modules={"embed_tokens"})
    assert facts.num_parameters == RANK * (VOCAB + HIDDEN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".default.weight"),
        ("base_model.model.", ""),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
    ],
)
def test_adapter_check_accepts_other_spellings_of_tensor_names(
    adapter: Path, base: BaseShapes, old: str, new: str
) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    edit_tensors(adapter, rename)
    assert check_adapter("a", str(adapter), base).modules == frozenset(ALL_LINEAR)


def test_adapter_check_treats_unembed_tokens_as_lm_head(tmp_path: Path, base: BaseShapes) -> None:
    folder = save_adapter(tmp_path / "x", target_modules=["q_proj"])

    def add(tensors: Tensors) -> None:
        tensors["base_model.model.model.unembed_tokens.lora_A.weight"] = torch.ones(RANK, HIDDEN)
        tensors["base_model.model.model.unembed_tokens.lora_B.weight"] = torch.ones(VOCAB, RANK)

    edit_tensors(folder, add)
    edit_config(folder, target_modules=["q_proj", "unembed_tokens"])
    facts = check_adapter("a", str(folder), base)
    assert facts.served_modules == {"qkv_proj", "lm_head"}


def test_adapter_check_accepts_pickled_weights(adapter: Path, base: BaseShapes) -> None:
    edit_tensors(adapter, lambda tensors: torch.save(dict(tensors), adapter / "adapter_model.bin"))
    torch.save({"lr": 0.1}, adapter / "training_args.bin")
    (adapter / WEIGHTS).unlink()
    facts = check_adapter("a", str(adapter), base)
    assert [file.name for file in facts.files] == ["adapter_model.bin"]


def test_adapter_check_accepts_a_copy_of_the_base_tokenizer(
    adapter: Path, base: BaseShapes
) -> None:
    (adapter / "added_tokens.json").write_text(json.dumps({"<s>": 1, "<last>": VOCAB - 1}))
    check_adapter("a", str(adapter), base)


def test_adapter_check_downloads_a_hub_id(
    saved: Path, base: BaseShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert check_adapter("a", "org/adapter", base).folder == saved
    assert asked == ["org/adapter"]


@pytest.mark.filterwarnings("ignore")
def test_weights_of_an_encoder_are_dropped_only_if_asked(tmp_path: Path, base: BaseShapes) -> None:
    folder = save_adapter(tmp_path / "x", target_modules="all-linear", rank_pattern={"q_proj": 2})
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"

    def add(tensors: Tensors) -> None:
        tensors[f"{tower}.lora_A.weight"] = torch.ones(9, HIDDEN)
        tensors[f"{tower}.lora_B.weight"] = torch.ones(HIDDEN, 9)

    alone = check_adapter("a", str(folder), base)
    edit_tensors(folder, add)
    assert_in(refusal(folder, base), "vision_tower", "vision or audio encoder")
    found = check_adapter("a", str(folder), base, drops_towers=True)
    assert found == replace(alone, num_dropped=2)
    assert read_adapter("a", str(folder)).keys().isdisjoint([f"{tower}.lora_A.weight"])


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_an_encoder_alone_is_refused_also_if_its_weights_may_be_dropped(
    tmp_path: Path, base: BaseShapes
) -> None:
    folder = save_adapter(tmp_path / "x", target_modules="all-linear")
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"

    def only(tensors: Tensors) -> None:
        tensors.clear()
        tensors[f"{tower}.lora_A.weight"] = torch.ones(RANK, HIDDEN)
        tensors[f"{tower}.lora_B.weight"] = torch.ones(HIDDEN, RANK)

    edit_tensors(folder, only)
    assert_in(refusal(folder, base, drops_towers=True), "vision_tower", "vision or audio encoder")


# The server's limits
def test_adapter_rank_above_max_lora_rank_is_refused(adapter: Path, base: BaseShapes) -> None:
    check_adapter("a", str(adapter), base, max_rank=RANK)
    assert_in(refusal(adapter, base, max_rank=2), "r=4", "--max-lora-rank 2", "--max-lora-rank 4")


@pytest.mark.parametrize("allowed", [{"qkv_proj", "o_proj"}, {"q_proj", "v_proj", "o_proj"}])
def test_adapter_modules_outside_the_server_targets_are_refused(
    adapter: Path, base: BaseShapes, allowed: set[str]
) -> None:
    text = refusal(adapter, base, target_modules=allowed)
    assert_in(text, "adapts down_proj, gate_up_proj", "--lora-target-modules")


def test_adapter_modules_within_the_server_targets_are_accepted(
    adapter: Path, base: BaseShapes
) -> None:
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    for allowed in (fused, set(ALL_LINEAR), {"all"}):
        check_adapter("a", str(adapter), base, target_modules=allowed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensured", [False, True])
def test_adapter_check_accepts_adapted_embeddings_and_output_layers(
    ensured: bool, tied: bool, named: list[str], tmp_path: Path
) -> None:
    """With ``ensure_weight_tying`` PEFT adapts both of a tied pair, whichever is named."""
    sizes = {"tie_word_embeddings": tied}
    targets = ["q_proj", *named]
    folder = save_adapter(
        tmp_path / "x", sizes=sizes, target_modules=targets, ensure_weight_tying=ensured
    )
    base = BaseShapes.from_config(tiny_config("Llama", **sizes))
    facts = check_adapter("a", str(folder), base)
    both = {"embed_tokens", "lm_head"} if ensured and tied else set(named)
    assert facts.served_modules == {"qkv_proj", *both}


@pytest.mark.filterwarnings("ignore")
def test_output_layer_is_not_a_target_because_the_embedding_is_one(
    tmp_path: Path, base: BaseShapes
) -> None:
    folder = save_adapter(tmp_path / "x", target_modules=["embed_tokens", "lm_head"])
    edit_config(folder, target_modules=["embed_tokens"])
    assert_in(refusal(folder, base), "weights of 'lm_head' are not in target_modules")
    edit_config(folder, ensure_weight_tying=True)
    check_adapter("a", str(folder), base)
