"""Names of the experts of mixture-of-experts (MoE) layers, as adapters store factors of them.

PEFT stores them in two forms. With transformers 4, each expert has modules of its own:
``layers.0.mlp.experts.3.gate_proj``. With transformers 5, a layer has one parameter for all
experts, ``gate_up_proj`` or ``down_proj``, which ``target_parameters`` names. Factors of such a
parameter are stored by the nesting of PEFT's wrappers: ``layers.0.mlp.experts`` and
``layers.0.mlp.experts.base_layer``.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from sglang_elora.adapters.module_names import endings

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PARAMETERS = (GATE_UP, DOWN)
"""Parameters ``[experts, out, in]`` of all experts of a layer, in the order in which transformers
registers them."""

PROJECTIONS = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
"""An expert's projection as stored (Mixtral's are w1, w2 and w3) -> its usual name."""

_INNER = ".base_layer"
_EXPERT = re.compile(
    r"(?P<experts>(?:.+\.)?experts)\.(?P<number>0|[1-9][0-9]{0,5})\.(?P<projection>[^.]+)"
)
_ALL_EXPERTS = re.compile(r"(?:.+\.)?experts(?:\.base_layer)?")
_LIKE_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.|$)|experts\.\d")


class Expert(NamedTuple):
    """One projection of one expert."""

    experts: str  # path of the module that holds the layer's experts
    number: int  # from 0
    projection: str  # "gate_proj", "up_proj" or "down_proj"

    @property
    def parameter(self) -> str:
        """Path of the parameter of all experts that contains this projection."""
        return f"{self.experts}.{DOWN if self.projection == DOWN else GATE_UP}"


def expert_of(path: str) -> Expert | None:
    """The expert's projection that a module's path names; None if it names none."""
    match = _EXPERT.fullmatch(path) if "experts." in path else None
    if match is None or match["projection"] not in PROJECTIONS:
        return None
    return Expert(match["experts"], int(match["number"]), PROJECTIONS[match["projection"]])


def is_nested(path: str) -> bool:
    """Whether factors stored at a path are those of a parameter of all experts of a layer."""
    return path.endswith(("experts", _INNER)) and _ALL_EXPERTS.fullmatch(path) is not None


def is_like_experts(path: str) -> bool:
    """Whether SGLang would take a module of that path for one of experts."""
    return "experts" in path and _LIKE_EXPERTS.search(path) is not None


def parameter_at(path: str, targets: AbstractSet[str]) -> str | None:
    """Path of the parameter whose factors are stored at a path for which ``is_nested`` is true.

    PEFT wraps the module once for each parameter that is named, in the order of ``PARAMETERS``
    (whatever the order of ``targets``), and only the outermost wrapper has the module's own path.

    Returns:
        None if ``target_parameters`` names too few parameters of the module.
    """
    experts = path.removesuffix(_INNER)
    named = [f"{experts}.{name}" for name in PARAMETERS]
    named = [parameter for parameter in named if not targets.isdisjoint(endings(parameter))]
    wrappers = (experts, experts + _INNER)  # the outermost first
    return dict(zip(wrappers, reversed(named), strict=False)).get(path)
