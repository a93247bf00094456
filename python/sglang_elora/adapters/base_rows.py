"""Whether an adapter's copy of the base model's embeddings is unchanged.

PEFT saves ``embed_tokens`` and ``lm_head`` with an adapter when the vocabulary was resized or the
modules are named, trained or not. An unchanged copy says nothing new, and is skipped.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_elora.adapters.module_names import EMBEDDINGS

_ROWS = 4096  # rows compared at a time
_TIED = {"lm_head": "embed_tokens"}  # a module without a weight of its own -> whose it has


class BaseRows:
    """The weights of a base model's embeddings, in the safetensors files of a local folder.

    Args:
        folder: None if the model is not local.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def difference(self, module: str, copy: Any) -> str | None:
        """How a copy differs from the base model's weight; None if every row is equal.

        Values are equal also if one is the other, rounded to its dtype.

        Args:
            module: "embed_tokens" or "lm_head".
            copy: torch tensor ``[rows, hidden_size]``.
        """
        found = self._files.get(module) or self._files.get(_TIED.get(module, ""))
        if found is None:
            return "it cannot be compared with the base model's, which has no safetensors file here"
        file, key = found
        safetensors: Any = importlib.import_module("safetensors")
        with safetensors.safe_open(str(file), framework="pt") as stored:
            rows = stored.get_slice(key)
            shape = rows.get_shape()
            if list(copy.shape) != shape:
                return f"its shape is {list(copy.shape)}, the base model's {shape}: it was resized"
            for start in range(0, shape[0], _ROWS):
                differs = _differing(copy[start : start + _ROWS], rows[start : start + _ROWS])
                if differs is not None:
                    return (
                        f"row {start + differs} differs from the base model's: it was trained, or "
                        "belongs to another base model"
                    )
        return None

    @cached_property
    def _files(self) -> dict[str, tuple[Path, str]]:
        """Per module, the file and the name of its weight."""
        if self._folder is None:
            return {}
        safetensors: Any = importlib.import_module("safetensors")
        found: dict[str, tuple[Path, str]] = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            try:
                with safetensors.safe_open(str(file), framework="pt") as stored:
                    keys = list(stored.keys())
            except (safetensors.SafetensorError, OSError):
                continue  # not the model's, or broken: SGLang says so
            for key in keys:
                parts = key.split(".")
                if parts[-1] == "weight" and parts[-2:-1] and parts[-2] in EMBEDDINGS:
                    found.setdefault(parts[-2], (file, key))
        return found


def _differing(copy: Any, base: Any) -> int | None:
    """The first row in which two matrices differ by more than rounding to one of their dtypes."""
    equal = copy.to(base.dtype) == base
    equal |= copy == base.to(copy.dtype)
    rows = (~equal).any(dim=1).nonzero()
    return int(rows[0]) if len(rows) else None
