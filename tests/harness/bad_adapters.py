"""The demo's adapters, spoiled in every way that a server must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def remove_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def halve_hidden_size(folder: Path) -> None:
    edit_weights(
        folder,
        lambda tensors: {
            name: (tensor[:, :128] if "lora_A" in name else tensor).contiguous()
            for name, tensor in tensors.items()
        },
    )


def announce_other_rank(folder: Path) -> None:
    edit_config(folder, r=16)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def diverge(folder: Path) -> None:
    edit_weights(
        folder,
        lambda tensors: {
            n: t.clone().index_fill_(0, torch.tensor(1), float("nan")) for n, t in tensors.items()
        },
    )


def make_dora(folder: Path) -> None:
    edit_config(folder, use_dora=True)


def add_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 999_999}))


def target_unknown_module(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "v_proj", "flux_proj"])
    edit_weights(
        folder,
        lambda tensors: {n.replace("v_proj", "flux_proj"): t for n, t in tensors.items()},
    )


BAD = {
    remove_weights: ("adapter_model",),
    remove_config: (CONFIG,),
    halve_hidden_size: (WEIGHTS, "128", "256"),
    announce_other_rank: ("rank", "16", "8"),
    truncate: (WEIGHTS, "truncated"),
    diverge: (WEIGHTS, "NaN"),
    make_dora: (CONFIG, "DoRA"),
    add_tokens: ("added_tokens.json",),
    target_unknown_module: ("flux_proj",),
}


def make_bad_adapters(good: Path, directory: Path) -> dict[str, Path]:
    """One spoiled copy of ``good`` for each entry of ``BAD``, by the name of what spoiled it."""
    folders = {}
    for spoil in BAD:
        folders[spoil.__name__] = directory / spoil.__name__
        shutil.copytree(good, folders[spoil.__name__])
        spoil(folders[spoil.__name__])
    return folders
