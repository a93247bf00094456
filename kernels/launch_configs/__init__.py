"""Launch configurations of the LoRA kernels: one data file per GPU, written by the tuner.

A file ``<name of the GPU>.json`` holds, per kernel, configurations with the shape each was tuned
for. A launch uses the one of the nearest shape. ``default.json`` is for GPUs without a file.

These files are for two-byte weights, which tensor cores multiply. float32 weights are multiplied
exactly, in registers, which do not hold tiles of that size: ``float32.json`` has smaller tiles, for
all GPUs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """Launch configuration of ``lora_shrink``.

    Args:
        block_n: Rows of A that a program multiplies at once; a power of two, at least 16.
        block_k: Columns of A that it multiplies at once; a power of two, at least 16.
        lanes: Programs that share the rows of A of one tile and split.
        num_splits: Programs that share the columns; each writes a partial sum.
        max_tile_programs: Most programs over tiles; with more tiles, a program computes several.
    """

    block_n: int
    block_k: int
    lanes: int
    num_splits: int
    max_tile_programs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Launch configuration of ``lora_expand``.

    Args:
        block_n: Columns of the output that a program computes; a power of two, at least 16.
        block_r: Rows of B's transpose that it multiplies at once; a power of two, at least 16.
        max_tile_programs: Most programs over tiles; with more tiles, a program computes several.
    """

    block_n: int
    block_r: int
    max_tile_programs: int
    num_warps: int
    num_stages: int


@cache
def shrink_config(
    device: torch.device,
    tile_rows: int,
    num_tiles: int,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
) -> ShrinkConfig:
    """The configuration tuned for the nearest shape; ``dtype`` is that of the weights."""
    shape = {"tile_rows": tile_rows, "num_tiles": num_tiles, "features": in_features}
    config = ShrinkConfig(**_nearest(_entries(device, dtype)["shrink"], shape))
    most = max(1, -(-in_features // config.block_k))
    if config.num_splits <= most:
        return config
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return ShrinkConfig(**{**values, "num_splits": most})


@cache
def expand_config(
    device: torch.device,
    tile_rows: int,
    num_tiles: int,
    out_features: int,
    dtype: torch.dtype = torch.bfloat16,
) -> ExpandConfig:
    """The configuration tuned for the nearest shape.

    Args:
        out_features: Output features of all parts together.
        dtype: Dtype of the weights.
    """
    shape = {"tile_rows": tile_rows, "num_tiles": num_tiles, "features": out_features}
    return ExpandConfig(**_nearest(_entries(device, dtype)["expand"], shape))


def tuned_tile_counts(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[int]:
    """Numbers of tiles that together select every configuration any number of tiles can select.

    These are the entries' own numbers: the distance grows equally on both sides of each entry, so
    an entry that is not the nearest at its own number of tiles is never the nearest.
    """
    entries = _entries(device, dtype)
    return sorted({e["shape"]["num_tiles"] for half in entries.values() for e in half})


def file_name(device: torch.device) -> str:
    """Name of the file with a device's configurations, which exists if the device was tuned."""
    is_cuda = device.type == "cuda"
    name: str = torch.cuda.get_device_name(device) if is_cuda else device.type
    return name.replace(" ", "_").replace("/", "_") + ".json"


@cache
def _entries(device: torch.device, dtype: torch.dtype) -> dict[str, list[dict[str, Any]]]:
    folder = files(__name__)
    if dtype == torch.float32:
        source = folder / "float32.json"
    else:
        tuned = folder / file_name(device)
        source = tuned if tuned.is_file() else folder / "default.json"
    entries: dict[str, list[dict[str, Any]]] = json.loads(source.read_text())
    return entries


def _nearest(entries: list[dict[str, Any]], shape: dict[str, int]) -> dict[str, int]:
    """Launch parameters of the entry whose shape differs by the smallest factors; tile rows weigh
    most."""

    def distance(entry: dict[str, Any]) -> float:
        weights = {"tile_rows": 100.0, "num_tiles": 1.0, "features": 1.0}
        return sum(
            weight * abs(math.log2(max(shape[name], 1) / entry["shape"][name]))
            for name, weight in weights.items()
        )

    launch: dict[str, int] = min(entries, key=distance)["launch"]
    return launch
