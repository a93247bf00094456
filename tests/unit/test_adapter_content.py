"""The digest of an adapter's content: equal for equal tensors in any file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_elora.adapters import content_digest, is_factor
from sglang_elora.adapters.errors import AdapterFolder
from sglang_elora.adapters.weight_files import load_tensors
from sglang_elora.pages import AdapterImage, AdapterLayout, ModuleShape

A, B = "layers.0.o_proj.lora_A.weight", "layers.0.o_proj.lora_B.weight"


def tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(32, dtype=torch.bfloat16)
    return {A: values.view(4, 8), B: values.view(8, 4) / 3}


def test_content_digest_is_equal_for_equal_tensors_in_different_files(tmp_path: Path) -> None:
    wanted = content_digest(tensors())
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    save_file(tensors(), first / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(dict(reversed(tensors().items())), second / "adapter_model.bin")
    found = [
        content_digest(load_tensors(AdapterFolder("a", f), is_factor)) for f in (first, second)
    ]
    assert found == [wanted, wanted]


def test_content_digest_does_not_depend_on_strides() -> None:
    transposed = {name: tensor.T.contiguous().T for name, tensor in tensors().items()}
    assert not transposed[A].is_contiguous()
    assert content_digest(transposed) == content_digest(tensors())


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "missing", "scalar"])
def test_content_digest_differs_for_another_value_name_shape_or_dtype(change: str) -> None:
    changed = tensors()
    if change == "value":
        changed[B] = changed[B].clone()
        changed[B][7, 3] += 1
    elif change == "name":
        changed["layers.1.o_proj.lora_A.weight"] = changed.pop(A)
    elif change == "shape":
        changed[A] = changed[A].view(8, 4)
    elif change == "dtype":
        changed[A] = changed[A].view(torch.float16)
    elif change == "missing":
        del changed[A]
    else:
        changed["alpha"] = torch.tensor(1.0)
    assert content_digest(changed) != content_digest(tensors())


def test_image_shards_of_one_file_share_the_given_version() -> None:
    layout = AdapterLayout.build(4, [ModuleShape("o_proj", 64, (64,))])
    images = [
        AdapterImage.build(
            layout,
            1,
            lambda *_, shard=shard: (torch.full((4, 64), shard), torch.ones(64, 4)),
            torch.float32,
            1.0,
            version="of the file",
        )
        for shard in (1.0, 2.0)
    ]
    assert [image.version for image in images] == ["of the file"] * 2
