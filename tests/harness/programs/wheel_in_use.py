"""Uses what a wheel installed under argv[1]: plugins, patches, launch configurations."""

import pathlib
import sys
from importlib.metadata import entry_points
from importlib.resources import files

import sglang_elora
import sglang_elora.kernels

assert str(pathlib.Path(sglang_elora.__file__)).startswith(sys.argv[1]), sglang_elora.__file__
assert {p.name for p in entry_points(group="sglang.srt.plugins")} == {"elora"}
assert {p.name for p in entry_points(group="sglang.srt.platforms")} == {"elora_cpu"}
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from sglang_elora.config import EloraConfig
from sglang_elora.srt.install.install import preflight

assert preflight(EloraConfig(enabled=True)) == []
names = {entry.name for entry in files("sglang_elora.patches").iterdir()}
assert {"README.md", "01-cache-namespace.patch"} <= names, names
import torch

from sglang_elora.kernels import expand_config, shrink_config

assert shrink_config(torch.device("cpu"), 16, 1, 4096).block_k
assert expand_config(torch.device("cpu"), 64, 1, 4096).block_n
print("in use")
