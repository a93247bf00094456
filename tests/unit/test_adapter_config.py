"""The folder, adapter_config.json and added_tokens.json: what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.adapters import BaseShapes
from tests.harness.peft_adapters import CONFIG, VOCAB, WEIGHTS, assert_in, edit_config, refusal


# The folder
def test_missing_adapter_path_is_refused(tmp_path: Path, base: BaseShapes) -> None:
    assert_in(refusal(tmp_path / "nope", base), str(tmp_path / "nope"), "does not exist")


def test_adapter_path_that_is_a_file_is_refused(adapter: Path, base: BaseShapes) -> None:
    assert_in(refusal(adapter / WEIGHTS, base), WEIGHTS, "is a file")


def test_unreachable_hub_is_reported(base: BaseShapes, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repo: str, **_: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    text = refusal("org/adapter", base)
    assert_in(text, "(org/adapter)", "no such folder", "Hub failed", "OfflineModeIsEnabled")


def test_overlong_adapter_path_is_refused(base: BaseShapes) -> None:
    assert_in(refusal("/" + "x" * 5000, base), "cannot be read")


# adapter_config.json
def test_missing_adapter_config_is_refused(adapter: Path, base: BaseShapes) -> None:
    (adapter / CONFIG).unlink()
    assert_in(refusal(adapter, base), f"{adapter}/{CONFIG}", "missing")


@pytest.mark.parametrize("content", ['{"r": 4,', "[]", "\xff"])
def test_adapter_config_that_is_not_json_is_refused(
    adapter: Path, base: BaseShapes, content: str
) -> None:
    (adapter / CONFIG).write_bytes(content.encode("latin-1"))
    assert_in(refusal(adapter, base), CONFIG, "JSON")


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_adapter_config_without_a_required_key_is_refused(
    adapter: Path, base: BaseShapes, key: str
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    del config[key]
    (adapter / CONFIG).write_text(json.dumps(config))
    assert_in(refusal(adapter, base), CONFIG, f"lacks '{key}'")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("r", 0, "positive integer, got 0"),
        ("r", "4", "positive integer, got '4'"),
        ("r", True, "positive integer, got True"),
        ("lora_alpha", None, "lora_alpha must be a number, got None"),
        ("lora_alpha", float("nan"), "lora_alpha must be a number"),
        ("target_modules", None, "target_modules must be a list"),
        ("target_modules", [], "target_modules is empty"),
        ("target_modules", "", "target_modules is empty"),
        ("peft_type", "ADALORA", "peft_type is 'ADALORA'"),
        ("use_dora", True, "use_dora"),
        ("use_qalora", True, "use_qalora"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora"),
        ("kasa_config", {"beta": 0.1}, "kasa_config"),
        ("monteclora_config", {"x": 1}, "monteclora_config"),
        ("arrow_config", {"top_k": 3}, "arrow_config"),
        ("alora_invocation_tokens", [], "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", [1, -2], "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", [1, True], "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", "3 4", "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", [2**31], "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", [1] * 1025, "a list of 1 to 1024 token ids"),
        ("alora_invocation_tokens", [10**6], "has token 1000000"),
        ("lora_bias", True, "lora_bias"),
        ("layer_replication", [[0, 2], [0, 2]], "layer_replication"),
        ("target_parameters", ["mlp.experts.down_proj"], "target_parameters"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("init_lora_weights", "pissa_niter_4", "'pissa_niter_4'"),
        ("init_lora_weights", "olora", "'olora'"),
        ("rank_pattern", {"(": 3}, "rank_pattern must map"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern must map"),
        ("alpha_pattern", {"q_proj": 1e6}, "layers.0.self_attn.q_proj a factor of 250000"),
        ("alpha_pattern", {"q_proj": float("inf")}, "alpha_pattern has the value inf"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern has the value 2.5"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern has the value 0"),
        ("rank_pattern", {"q_proj": 10**6}, "rank_pattern has the value 1e+06"),
    ],
)
def test_unsupported_adapter_config_value_is_refused(
    adapter: Path, base: BaseShapes, key: str, value: object, part: str
) -> None:
    edit_config(adapter, **{key: value})
    assert_in(refusal(adapter, base), f"{adapter}/{CONFIG}", part)


def test_rank_that_differs_from_its_pattern_is_refused(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, rank_pattern={r"layers\.1\..*up_proj": 8})
    text = refusal(adapter, base)
    assert_in(text, "layers.1.mlp.up_proj", "rank 4", "says r=8", "patterns in adapter_config.json")


def test_every_peft_option_is_read_refused_or_harmless() -> None:
    """A field that a new peft adds must be read, refused, or declared harmless here."""
    import dataclasses

    import peft

    from sglang_elora.adapters import config_file

    harmless = {
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config"),
        *("eva_config", "velora_config", "ensure_weight_tying", "qalora_group_size"),
        # Decided by init_lora_weights and by the tensors present.
        *("loftq_config", "corda_config", "lora_ga_config", "bias"),
    }
    read = {"base_model_name_or_path", "use_rslora", "modules_to_save", "rank_pattern"}
    read |= {"alpha_pattern", "init_lora_weights", "alora_invocation_tokens", "target_parameters"}
    decided = harmless | read | set(config_file._REQUIRED) | set(config_file._REFUSED)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - decided == set()


def test_adapter_with_added_tokens_is_refused(adapter: Path, base: BaseShapes) -> None:
    (adapter / "added_tokens.json").write_text(json.dumps({"<s>": 1, "<new>": VOCAB}))
    text = refusal(adapter, base)
    assert_in(text, "added_tokens.json", "1 tokens", f"of {VOCAB}", f"'<new>' with id {VOCAB}")
