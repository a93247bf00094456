"""Adapters sent in requests, as tensors."""

from __future__ import annotations

import base64
import io
import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

PATH = "/load_lora_adapter_from_tensors"


def sent(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The body of a request with these tensors and the configuration of the adapter in ``folder``.

    A server that is not a child of this process can read them only with
    ``torch.multiprocessing.set_sharing_strategy("file_system")``.
    """
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(tensors)
    return {
        "lora_name": name,
        "config_dict": json.loads((folder / "adapter_config.json").read_text()),
        "serialized_named_tensors": [base64.b64encode(buffer.getvalue()).decode()],
    }
