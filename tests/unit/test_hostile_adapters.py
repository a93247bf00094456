"""Folders made to hang, exhaust or end the process that reads them: each is refused, by file."""

from __future__ import annotations

import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from sglang_elora.adapters import AdapterError, BaseShapes, check_adapter, read_adapter
from sglang_elora.adapters.bounded_files import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_PROGRAM_BYTES,
)
from tests.harness.peft_adapters import CONFIG, WEIGHTS, assert_in, edit_config, refusal

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
def test_catastrophic_regex_patterns_are_refused(
    adapter: Path, base: BaseShapes, option: str, key: str
) -> None:
    edit_config(adapter, **{option: {key: 5}})
    assert_in(refusal(adapter, base), CONFIG, option)


def test_too_many_patterns_are_refused(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, rank_pattern={f".*x{i}": 5 for i in range(100_000)})
    assert_in(refusal(adapter, base), CONFIG, "rank_pattern")


def test_usual_patterns_are_accepted(adapter: Path, base: BaseShapes) -> None:
    keys = ("q_proj", "model.layers.0.self_attn.q_proj", r"^layers\.\d+\..*", "(q_proj|v_proj)$")
    for key in keys[:2] + keys[3:]:
        edit_config(adapter, rank_pattern={key: 4})
        check_adapter("alice", str(adapter), base)


@pytest.mark.parametrize(
    "alpha",
    ["1e308", "-1e308", "1e5", str(10**400), "NaN", "Infinity", "-Infinity", "true", '"8"', "[8]"],
)
def test_overflowing_lora_alpha_is_refused(adapter: Path, base: BaseShapes, alpha: str) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    config["lora_alpha"] = "ALPHA"
    (adapter / CONFIG).write_text(json.dumps(config).replace('"ALPHA"', alpha))
    assert_in(refusal(adapter, base), CONFIG, "lora_alpha")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, PICKLED])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "broken link", "loop"])
def test_adapter_files_that_are_not_regular_are_not_opened(
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


def test_huge_config_is_refused_unread(adapter: Path, base: BaseShapes) -> None:
    os.truncate(adapter / CONFIG, 500 << 20)  # sparse
    assert_in(refusal(adapter, base), CONFIG, str(MAX_JSON_BYTES))


def test_huge_safetensors_header_is_refused_unread(adapter: Path, base: BaseShapes) -> None:
    with (adapter / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", 3 << 30))
        stream.truncate((3 << 30) + 8)  # sparse
    assert_in(refusal(adapter, base), WEIGHTS, str(MAX_HEADER_BYTES))


def test_compressed_pickle_archive_is_refused(adapter: Path, base: BaseShapes) -> None:
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


def test_tensors_larger_than_their_file_are_refused(adapter: Path, base: BaseShapes) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / WEIGHTS)
    torch.save(
        {name: torch.zeros(1).expand(t.shape) for name, t in tensors.items()}, adapter / PICKLED
    )
    (adapter / WEIGHTS).unlink()
    assert_in(refusal(adapter, base), PICKLED, "bytes", "holds")


def test_legacy_non_zip_pickle_is_refused(adapter: Path, base: BaseShapes) -> None:
    as_pickle(adapter, _use_new_zipfile_serialization=False)
    assert_in(refusal(adapter, base), PICKLED, "torch.save")


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deeply_nested_json_is_refused(adapter: Path, base: BaseShapes, depth: int) -> None:
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
def test_any_config_value_is_served_or_refused_without_a_crash(
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
def test_other_files_in_the_adapter_folder_are_ignored(
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
def test_adapter_names_unsafe_for_logs_are_refused(
    adapter: Path, base: BaseShapes, name: str
) -> None:
    with pytest.raises(AdapterError, match="name"):
        check_adapter(name, str(adapter), base)


@pytest.mark.parametrize("name", ["a", "team/law", "law:v2", "Größe 5", "法律", "x" * 256])
def test_usual_adapter_names_are_accepted(adapter: Path, base: BaseShapes, name: str) -> None:
    assert check_adapter(name, str(adapter), base).name == name


def numbered(count: int, value: object) -> dict[str, object]:
    return {f"m{i}": value for i in range(count)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", numbered(100_000, 5)),
        ("target_modules", list(numbered(100_000, 5))),
        ("modules_to_save", list(numbered(100_000, 5))),
        ("r", 10**400),
        ("rank_pattern", {"[[a]": 5}),
        ("alpha_pattern", {"[a--b]": 5}),
    ],
    ids=["many keys", "many targets", "many saved", "huge rank", "nested set", "set difference"],
)
def test_oversized_config_is_answered_within_the_time_limit(
    adapter: Path, base: BaseShapes, key: str, value: object
) -> None:
    edit_config(adapter, **{key: value})
    start = time.monotonic()
    if key == "modules_to_save":
        check_adapter("alice", str(adapter), base)
    else:
        assert_in(refusal(adapter, base), f"{adapter}/{CONFIG}", key)
    assert time.monotonic() - start < 5


def test_rank_pattern_with_1000_modules_is_accepted(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, rank_pattern=numbered(1000, 5))
    check_adapter("alice", str(adapter), base)


def write_header(file: Path, header: object) -> None:
    content = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model." + "model." * 100_000 + "layers.0.self_attn.q_proj.lora_A.weight",
        f"model.layers.{'7' * 5000}.self_attn.q_proj.lora_A.weight",
        "\x1b[2J.lora_A.weight",
        "a\nb",
        "\u202ea.lora_A.weight",
    ],
    ids=["long", "many digits", "escape", "line", "turned"],
)
def test_tensor_names_no_module_can_have_are_refused(
    adapter: Path, base: BaseShapes, name: str
) -> None:
    entry = {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}
    write_header(adapter / WEIGHTS, {name: entry})
    text = refusal(adapter, base)
    assert_in(text, f"{adapter}/{WEIGHTS}", "characters")
    assert text.isprintable() and len(text) < 3000


def test_too_many_tensors_are_refused(adapter: Path, base: BaseShapes) -> None:
    entry = {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}
    write_header(adapter / WEIGHTS, numbered(140_000, entry))
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "140000 tensors")


@pytest.mark.parametrize("item", ["[],", "{},", "0,", '"",'])
def test_header_of_more_values_than_tensors_have_is_not_parsed(
    adapter: Path, base: BaseShapes, item: str
) -> None:
    content = ("[" + item * (2 << 20) + "0]").encode()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(content)) + content)
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "does not parse", "entries")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rank_pattern": {f"(a|b|.*x{i}|c)z": 5 for i in range(32)}}, "rank_pattern"),
        ({"target_modules": [f"x{i}" for i in range(2000)]}, "not in target_modules"),
    ],
    ids=["expressions", "targets"],
)
def test_many_modules_of_an_unknown_base_are_compared_in_time(
    adapter: Path, changes: dict[str, Any], part: str
) -> None:
    from safetensors.torch import save_file

    edit_config(adapter, r=1, **{"target_modules": "all-linear"} | changes)
    save_file(
        {
            f"{'y.' * 40}layers.{i}.q{i}.lora_{side}.weight": torch.ones(1, 1)
            for i in range(5000)
            for side in "AB"
        },
        adapter / WEIGHTS,
    )
    start = time.monotonic()
    assert_in(refusal(adapter, BaseShapes.unknown("a test")), f"{adapter}/{CONFIG}", part)
    assert time.monotonic() - start < 5


def test_many_unserved_tensors_are_counted_in_time(adapter: Path, base: BaseShapes) -> None:
    edit_config(adapter, modules_to_save=list(numbered(2000, 5)))
    entry = {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}
    write_header(adapter / WEIGHTS, numbered(100_000, entry))
    start = time.monotonic()
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "and 99997 more")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "changes",
    [
        *({"data_offsets": [0, "4"]}, {"data_offsets": [0, 4.0]}, {"shape": "11"}),
        *({"shape": [1.0]}, {"shape": [-1]}, {"shape": [0, 1 << 63]}, {"shape": [0, 10**400]}),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_impossible_tensor_sizes_are_refused_naming_the_file(
    adapter: Path, base: BaseShapes, changes: dict[str, Any]
) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    write_header(adapter / WEIGHTS, {"a": entry})
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "does not parse")


@pytest.mark.parametrize(
    "error", [safetensors.SafetensorError("no"), OSError("no"), TypeError("no"), ValueError("no")]
)
def test_weights_that_cannot_be_loaded_are_refused_naming_the_file(
    adapter: Path, base: BaseShapes, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file that is replaced between the check of its header and the reading."""

    def load(data: bytes) -> Any:
        raise error

    monkeypatch.setattr("safetensors.torch.load", load)
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "cannot read it: no")
    with pytest.raises(AdapterError, match="cannot read it: no"):
        read_adapter("alice", str(adapter))


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
@pytest.mark.parametrize(
    "value", [["x"] * 1000, "\x1b[2J\u202e", "y" * 100_000], ids=["list", "escape", "long"]
)
def test_refusal_text_is_truncated_and_printable(
    adapter: Path, base: BaseShapes, key: str, value: object
) -> None:
    edit_config(adapter, **{key: {"a": value}})
    text = refusal(adapter, base)
    assert text.isprintable() and len(text) < 3000


@pytest.mark.parametrize("file", ["\x1b[2J.safetensors", "\u202e.bin"], ids=["escape", "turned"])
def test_refusal_escapes_unprintable_file_names(adapter: Path, base: BaseShapes, file: str) -> None:
    (adapter / WEIGHTS).rename(adapter / file)
    (adapter / file).write_bytes(b"broken")
    text = refusal(adapter, base)
    assert_in(text, str(adapter), Path(file).suffix)
    assert text.isprintable()


@pytest.mark.parametrize(
    "call",
    ["torch.storage\nUntypedStorage", "torch\nTensor", "builtins\nbytearray", "os\nsystem"],
    ids=lambda call: call.split("\n")[1],
)
def test_pickle_calling_other_functions_is_not_executed(
    adapter: Path, base: BaseShapes, call: str
) -> None:
    stored = as_pickle(adapter)
    huge = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    program = b"\x80\x02}X\x01\x00\x00\x00a" + f"c{call}\n".encode() + huge + b"\x85Rs."
    edit_archive(stored, lambda name, content: program if name.endswith(".pkl") else content)
    assert_in(refusal(adapter, base), f"{adapter}/{PICKLED}", call.split("\n")[1])


def test_pickle_with_bad_tensor_arguments_is_refused_naming_the_file(
    adapter: Path, base: BaseShapes
) -> None:
    stored = as_pickle(adapter)
    program = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n)Rs."
    edit_archive(stored, lambda name, content: program if name.endswith(".pkl") else content)
    assert_in(refusal(adapter, base), f"{adapter}/{PICKLED}", "TypeError")


def test_oversized_pickle_program_is_not_executed(adapter: Path, base: BaseShapes) -> None:
    stored = as_pickle(adapter)
    program = b"\x80\x02" + b"N0" * MAX_PROGRAM_BYTES + b"N."
    edit_archive(stored, lambda name, content: program if name.endswith(".pkl") else content)
    assert_in(refusal(adapter, base), f"{adapter}/{PICKLED}", str(MAX_PROGRAM_BYTES))


def test_pickled_parameters_are_read_as_plain_tensors(adapter: Path, base: BaseShapes) -> None:
    tensors = torch.load(as_pickle(adapter), weights_only=True)
    torch.save({n: torch.nn.Parameter(t) for n, t in tensors.items()}, adapter / PICKLED)
    check_adapter("alice", str(adapter), base)
    assert not any(t.requires_grad for t in read_adapter("alice", str(adapter)).values())


def edit_archive(file: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Change the contents of a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name, content))
