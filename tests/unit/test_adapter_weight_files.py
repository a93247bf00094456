"""Weight files that are missing, broken or stored twice."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sglang_elora.adapters import AdapterError, BaseShapes, check_adapter
from tests.harness.peft_adapters import (
    CONFIG,
    WEIGHTS,
    assert_in,
    edit_tensors,
    refusal,
)


# The weights file
def test_missing_weights_are_refused(adapter: Path, base: BaseShapes) -> None:
    (adapter / WEIGHTS).unlink()
    assert_in(refusal(adapter, base), f"{adapter}/{WEIGHTS}", "missing")


def test_empty_weights_file_is_refused(adapter: Path, base: BaseShapes) -> None:
    (adapter / WEIGHTS).write_bytes(b"")
    assert_in(refusal(adapter, base), WEIGHTS, "0 bytes")


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_model.bin"])
def test_weights_that_are_an_lfs_pointer_are_refused(
    adapter: Path, base: BaseShapes, file: str
) -> None:
    (adapter / WEIGHTS).unlink()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (adapter / file).write_text(text)
    assert_in(refusal(adapter, base), file, "Git LFS pointer", "git lfs pull")


def test_truncated_weights_are_refused(adapter: Path, base: BaseShapes) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    data_bytes = len(content) - 8 - header_bytes
    (adapter / WEIGHTS).write_bytes(content[:-100])
    text = refusal(adapter, base)
    assert_in(text, WEIGHTS, "truncated", f"{data_bytes} bytes", f"holds {data_bytes - 100}")


def test_weights_cut_inside_the_header_are_refused(adapter: Path, base: BaseShapes) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:100])
    need = int.from_bytes(content[:8], "little") + 8
    assert_in(refusal(adapter, base), WEIGHTS, "has 100 bytes", f"need {need}")


@pytest.mark.parametrize("length", [3, 8])
def test_weights_shorter_than_a_header_are_refused(
    adapter: Path, base: BaseShapes, length: int
) -> None:
    (adapter / WEIGHTS).write_bytes(b"\x01" * length)
    assert_in(refusal(adapter, base), WEIGHTS, f"has {length} bytes")


def test_weights_with_extra_bytes_are_refused(adapter: Path, base: BaseShapes) -> None:
    with (adapter / WEIGHTS).open("ab") as stream:
        stream.write(b"extra")
    assert_in(refusal(adapter, base), WEIGHTS, "corrupt")


@pytest.mark.parametrize(
    "header",
    [b"{not json", b"[]", b'{"t": {"dtype": "F32"}}', b'{"t": 5}'],
)
def test_weights_with_an_unparsable_header_are_refused(
    adapter: Path, base: BaseShapes, header: bytes
) -> None:
    (adapter / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert_in(refusal(adapter, base), WEIGHTS, "header does not parse")


def test_weights_rejected_by_safetensors_are_refused(adapter: Path, base: BaseShapes) -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 4]}  # 6 floats in 4 bytes
    header = json.dumps({"t": entry}).encode()
    (adapter / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert_in(refusal(adapter, base), WEIGHTS, "safetensors rejects")


def test_weights_without_tensors_are_refused(adapter: Path, base: BaseShapes) -> None:
    edit_tensors(adapter, dict.clear)
    assert_in(refusal(adapter, base), WEIGHTS, "no tensors")


@pytest.mark.parametrize("content", ["garbage", "object", "nested"])
def test_bad_pickle_weights_are_refused(adapter: Path, base: BaseShapes, content: str) -> None:
    (adapter / WEIGHTS).unlink()
    file = adapter / "adapter_model.bin"
    if content == "garbage":
        file.write_bytes(b"garbage")
    elif content == "object":
        file.write_bytes(pickle.dumps(Path("code would run"), protocol=2))
    else:
        torch.save({"model": {"a": torch.ones(1)}}, file)
    assert_in(refusal(adapter, base), "adapter_model.bin", "tensors")


def test_tensor_in_two_files_is_refused(adapter: Path, base: BaseShapes) -> None:
    (adapter / WEIGHTS).rename(adapter / "one.safetensors")
    shutil.copy(adapter / "one.safetensors", adapter / "other.safetensors")
    assert_in(refusal(adapter, base), "other.safetensors", "is also in", "and 25 more")


def test_adapter_errors_survive_pickling(adapter: Path, base: BaseShapes) -> None:
    (adapter / CONFIG).unlink()
    with pytest.raises(AdapterError) as caught:
        check_adapter("a", str(adapter), base)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
