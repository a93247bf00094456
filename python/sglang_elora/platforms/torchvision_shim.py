"""Stand-in operators that let CPU builds of torch import the torchvision wheel of PyPI.

PyPI ships torchvision for CUDA only. With a CPU build of torch its extension
library does not load, and the import then fails because it registers fake
kernels for two operators, ``torchvision::nms`` and ``torchvision::qnms``,
that the extension would have defined. SGLang and transformers import
torchvision at start. Defining the two schemas (no kernels: calling them still
raises) is enough for that import.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_SCHEMAS = ("nms", "qnms")
_libraries: list[Any] = []  # a torch.library.Library undoes its definitions when collected


def ensure_torchvision_importable() -> bool:
    """Define the missing operators if, and only if, the real ones cannot load.

    Must run before the first import of torchvision. Idempotent.

    Returns:
        True if stand-in schemas are in place, False if none were needed
        (torchvision absent, or its own extension library loads).
    """
    if _libraries:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False

    import torch

    if all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS):
        return False
    extension = Path(spec.origin).parent / "_C.so"
    try:
        torch.ops.load_library(str(extension))
        return False
    except OSError:
        pass  # built for another torch: fall through to the stand-ins
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True
