"""Folders made to hang, exhaust or end the process that reads them: each is refused, by file."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test_adapter_support as support
from sglang_elora.adapters import AdapterError, BaseShapes, check_adapter, read_adapter
from sglang_elora.adapters.bounded_files import MAX_HEADER_BYTES, MAX_JSON_BYTES
from test_adapter_support import CONFIG, WEIGHTS, assert_in, edit_config, refusal

base, saved, adapter = support.base, support.saved, support.adapter

PICKLED = "adapter_model.bin"


def as_pickle(adapter: Path, **options: Any) -> Path:
    """The adapter's weights as torch saves them, in place of its safetensors."""
    from safetensors.torch import load_file

    torch.save(load_file(adapter / WEIGHTS), adapter / PICKLED, **options)
    (adapter / WEIGHTS).unlink()
    return adapter / PICKLED


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key",
    [
        "(([a-z_0-9.]+)+)+!",
        "(a|aa)+$",
        ".*.*.*.*.*.*.*.*.*!",
        "(.?){40}!",
        "([a-z]|.)" * 50 + "!",
        "(?=.*x)(?=.*y)!",
        "(.)\\1",
        "x" * 5000,
    ],
)
def test_expressions_that_may_take_for_ever_are_not_tried(
    adapter: Path, base: BaseShapes, option: str, key: str
) -> None:
    edit_config(adapter, **{option: {key: 5}})
    assert_in(refusal(adapter, base), CONFIG, option)


def test_many_expressions_are_not_tried(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, rank_pattern={f".*x{i}": 5 for i in range(100_000)})
    assert_in(refusal(adapter, base), CONFIG, "rank_pattern")


def test_usual_expressions_are_read(adapter: Path, base: BaseShapes) -> None:
    keys = ("q_proj", "model.layers.0.self_attn.q_proj", r"^layers\.\d+\..*", "(q_proj|v_proj)$")
    for key in keys[:2] + keys[3:]:
        edit_config(adapter, rank_pattern={key: 4})
        check_adapter("alice", str(adapter), base)


@pytest.mark.parametrize(
    "alpha",
    ["1e308", "-1e308", "1e5", str(10**400), "NaN", "Infinity", "-Infinity", "true", '"8"', "[8]"],
)
def test_scales_that_overflow_where_they_are_used_are_refused(
    adapter: Path, base: BaseShapes, alpha: str
) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    config["lora_alpha"] = "ALPHA"
    (adapter / CONFIG).write_text(json.dumps(config).replace('"ALPHA"', alpha))
    assert_in(refusal(adapter, base), CONFIG, "lora_alpha")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, PICKLED])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "broken link", "loop"])
def test_what_is_no_regular_file_is_not_opened(
    adapter: Path, base: BaseShapes, file: str, kind: str
) -> None:
    if file == PICKLED:
        as_pickle(adapter)
    path = adapter / file
    path.unlink()
    make: dict[str, Callable[[], None]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "broken link": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    assert_in(refusal(adapter, base), file)


def test_a_huge_config_is_not_read(adapter: Path, base: BaseShapes) -> None:
    os.truncate(adapter / CONFIG, 500 << 20)  # sparse
    assert_in(refusal(adapter, base), CONFIG, str(MAX_JSON_BYTES))


def test_a_huge_header_is_not_read(adapter: Path, base: BaseShapes) -> None:
    with (adapter / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", 3 << 30))
        stream.truncate((3 << 30) + 8)  # sparse
    assert_in(refusal(adapter, base), WEIGHTS, str(MAX_HEADER_BYTES))


def test_an_archive_that_would_be_inflated_is_not(adapter: Path, base: BaseShapes) -> None:
    stored = as_pickle(adapter)
    deflated = adapter / "deflated"
    with (
        zipfile.ZipFile(stored) as source,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    deflated.rename(stored)
    assert_in(refusal(adapter, base), PICKLED, "compressed")


def test_tensors_larger_than_their_file_are_not_made_whole(adapter: Path, base: BaseShapes) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / WEIGHTS)
    torch.save(
        {name: torch.zeros(1).expand(t.shape) for name, t in tensors.items()}, adapter / PICKLED
    )
    (adapter / WEIGHTS).unlink()
    assert_in(refusal(adapter, base), PICKLED, "bytes", "holds")


def test_a_pickle_of_before_zip_archives_is_refused(adapter: Path, base: BaseShapes) -> None:
    as_pickle(adapter, _use_new_zipfile_serialization=False)
    assert_in(refusal(adapter, base), PICKLED, "torch.save")


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_json_is_a_refusal(adapter: Path, base: BaseShapes, depth: int) -> None:
    (adapter / CONFIG).write_text("[" * depth)
    assert_in(refusal(adapter, base), CONFIG)


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 0, 1.5, "x", [], {}, [[]], {"a": None}, 10**400],
    ids=lambda value: str(value)[:9],
)
@pytest.mark.parametrize(
    "key",
    [
        *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
        *("use_rslora", "modules_to_save", "base_model_name_or_path", "init_lora_weights"),
        *("use_dora", "layers_to_transform", "bias", "fan_in_fan_out"),
    ],
)
def test_any_value_of_any_option_is_served_or_refused(
    adapter: Path, base: BaseShapes, key: str, value: object
) -> None:
    edit_config(adapter, **{key: value})
    try:
        facts = check_adapter("alice", str(adapter), base)
    except AdapterError as error:
        assert str(adapter) in str(error)
    else:
        assert facts.modules


@pytest.mark.parametrize("beside", ["value_head.safetensors", "model.safetensors", PICKLED])
def test_what_lies_beside_the_adapters_file_is_not_the_adapter(
    adapter: Path, base: BaseShapes, beside: str
) -> None:
    expected = read_adapter("alice", str(adapter))
    (adapter / beside).write_bytes(b"of a trainer's")
    check_adapter("alice", str(adapter), base)
    assert read_adapter("alice", str(adapter)).keys() == expected.keys()


@pytest.mark.parametrize(
    "name",
    ["", " a", "a ", "a\nb", "\x1b[2Ja", "a\x00", "a\u202eb", "\ud800", "x" * 257],
    ids=[
        "empty",
        "space before",
        "space behind",
        "line",
        "escape",
        "null",
        "turned",
        "surrogate",
        "long",
    ],
)
def test_names_that_spoil_a_log_or_terminal_are_refused(
    adapter: Path, base: BaseShapes, name: str
) -> None:
    with pytest.raises(AdapterError, match="name"):
        check_adapter(name, str(adapter), base)


@pytest.mark.parametrize("name", ["a", "team/law", "law:v2", "Größe 5", "法律", "x" * 256])
def test_usual_names_are_served(adapter: Path, base: BaseShapes, name: str) -> None:
    assert check_adapter(name, str(adapter), base).name == name
