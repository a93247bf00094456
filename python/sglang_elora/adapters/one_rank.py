"""Adapters whose modules differ in rank or scaling, as adapters of one rank and one scaling.

SGLang serves one rank and one scaling per adapter, and ignores PEFT's rank_pattern and
alpha_pattern. Zero rows of A and zero columns of B fill the smaller modules up to the largest rank,
and B takes a module's own factor; the products are unchanged. Weights of MoE experts become one
matrix for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_elora.adapters.config_file import (
    ALL_LINEAR,
    TARGET_PARAMETERS,
    TIES_EMBEDDINGS,
    AdapterConfig,
    parse_config,
)
from sglang_elora.adapters.errors import AdapterFolder
from sglang_elora.adapters.expert_tensors import parts_of, pattern_path
from sglang_elora.adapters.experts import PARAMETERS, PROJECTIONS, is_like_experts, is_nested
from sglang_elora.adapters.module_names import served_names
from sglang_elora.adapters.tensor_rules import factor_of, is_factor, num_unserved

_RENAMED = frozenset(old for old, new in PROJECTIONS.items() if old != new)

NUM_DROPPED = "elora_num_dropped"
"""Key of the number of an adapter's stored factors that are not served, in ``one_rank_config``."""


def one_rank_config(
    name: str, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The adapter_config.json of the tensors that ``one_rank_tensors`` returns.

    Also replaces ``target_modules`` by the names of the modules that are served, if it is a regular
    expression, which is not read, if PEFT adapted a tied module with one that it names, if
    parameters of MoE experts are adapted, or if some of the tensors are not served (how many: key
    ``NUM_DROPPED``). With weights of experts, both of their modules are named, because SGLang
    adapts only both.

    Args:
        name: The adapter's name, for errors.
        stored: The content of its adapter_config.json.
        shapes: Shapes by the tensors' stored names.

    Raises:
        AdapterError: The configuration is invalid.
    """
    folder = _folder(name)
    config, made = parse_config(folder, stored), dict(stored)
    found = [(factor_of(key), shape) for key, shape in shapes.items() if is_factor(key)]
    ranks: dict[str, int] = {}
    for factor, shape in found:
        if factor and factor.side == "A":
            path = pattern_path(folder, config, factor.path)
            ranks[path] = config.rank_of(path) if is_nested(factor.path) else shape[0]
    has_experts = any(is_like_experts(path) for path in ranks)
    if (
        _names_other_modules(stored)
        or len(found) < len(shapes)
        or (has_experts and _names_half_of_experts(stored))
    ):
        leaves = {path.rsplit(".", 1)[-1] for path in ranks}
        if has_experts:
            leaves = {PROJECTIONS.get(leaf, leaf) for leaf in leaves} | set(PARAMETERS)
        made["target_modules"] = sorted(leaves)
        made[NUM_DROPPED] = num_unserved(shapes)
    if config.target_parameters:
        made[TARGET_PARAMETERS] = None
    if config.has_patterns:
        rank = max(ranks.values())
        made |= {"r": rank, "lora_alpha": _common_scaling(config) * rank, "use_rslora": False}
        made |= {"rank_pattern": {}, "alpha_pattern": {}}
    return made


def one_rank_tensors(
    name: str, stored: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's tensors with the largest rank in every module, and one scaling; one A and B for
    each expert, which are views if nothing else changes.

    Args:
        name, stored: As of ``one_rank_config``.
        tensors: torch tensors by their stored names.

    Raises:
        AdapterError: The configuration is invalid, or the shapes of experts' factors do not fit it.
    """
    folder = _folder(name)
    config = parse_config(folder, stored)
    parts = list(parts_of(folder, config, tensors))
    made = {part.name: part.tensor for part in parts}
    if not config.has_patterns:
        return made
    rank = max(len(part.tensor) for part in parts if part.factor and part.factor.side == "A")
    common = _common_scaling(config)
    for key, factor, tensor in parts:
        if factor is None:
            continue
        if factor.side == "A":
            made[key] = _padded(tensor, (rank, tensor.shape[1]))
        else:
            own = config.scaling_of(factor.path)
            scaled = tensor if own == common else tensor.float() * (own / common)
            made[key] = _padded(scaled, (len(tensor), rank))
    return made


def needs_one_rank(stored: Mapping[str, Any]) -> bool:
    """Whether ``one_rank_config`` may differ from the stored configuration."""
    return bool(
        _names_other_modules(stored)
        or _names_half_of_experts(stored)
        or stored.get("rank_pattern")
        or stored.get("alpha_pattern")
    )


def _names_other_modules(stored: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` may be other names than those of the adapted modules: a regular
    expression, parameters, one of two modules that PEFT adapts together, or other names of experts'
    projections."""
    if stored.get(TIES_EMBEDDINGS) or stored.get(TARGET_PARAMETERS):
        return True
    targets = stored.get("target_modules")
    if isinstance(targets, str):
        return targets not in ALL_LINEAR
    return any(target.rsplit(".", 1)[-1] in _RENAMED for target in targets or ())


def _names_half_of_experts(stored: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` names one of the two modules that SGLang's experts have."""
    targets = stored.get("target_modules")
    named = served_names(targets) if isinstance(targets, list) else frozenset[str]()
    return len(named.intersection(PARAMETERS)) == 1


def _folder(name: str) -> AdapterFolder:
    return AdapterFolder(name, Path("request"))


def _common_scaling(config: AdapterConfig) -> float:
    return config.scaling or 1.0  # a factor of 0 cannot be multiplied up


def _padded(tensor: Any, shape: tuple[int, int]) -> Any:
    """The matrix with zeros added at its ends, to ``shape``."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded
