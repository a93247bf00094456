"""Adapters whose modules differ in rank or scaling, as adapters of one rank and one scaling.

SGLang serves one rank and one scaling per adapter, and ignores PEFT's rank_pattern and
alpha_pattern. Zero rows of A and zero columns of B fill the smaller modules up to the largest rank,
and B takes a module's own factor; the products are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_elora.adapters.config_file import (
    ALL_LINEAR,
    TIES_EMBEDDINGS,
    AdapterConfig,
    parse_config,
)
from sglang_elora.adapters.errors import AdapterFolder
from sglang_elora.adapters.tensor_rules import factor_of, is_factor, num_unserved

NUM_DROPPED = "elora_num_dropped"
"""Key of the number of an adapter's stored factors that are not served, in ``one_rank_config``."""


def one_rank_config(
    name: str, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The adapter_config.json of the tensors that ``one_rank_tensors`` returns.

    Also replaces ``target_modules`` by the names of the modules that are served, if it is a regular
    expression, which is not read, if PEFT adapted a tied module with one that it names, or if some
    of the tensors are not served (how many: key ``NUM_DROPPED``).

    Args:
        name: The adapter's name, for errors.
        stored: The content of its adapter_config.json.
        shapes: Shapes by the tensors' stored names.

    Raises:
        AdapterError: The configuration is invalid.
    """
    config, made = _parse(name, stored), dict(stored)
    found = [(factor_of(key), shape) for key, shape in shapes.items() if is_factor(key)]
    ranks = {factor.path: shape[0] for factor, shape in found if factor and factor.side == "A"}
    if _names_other_modules(stored) or len(found) < len(shapes):
        made["target_modules"] = sorted({path.rsplit(".", 1)[-1] for path in ranks})
        made[NUM_DROPPED] = num_unserved(shapes)
    if config.has_patterns:
        rank = max(ranks.values())
        made |= {"r": rank, "lora_alpha": _common_scaling(config) * rank, "use_rslora": False}
        made |= {"rank_pattern": {}, "alpha_pattern": {}}
    return made


def one_rank_tensors(
    name: str, stored: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's tensors with the largest rank in every module, and one scaling.

    Args:
        name, stored: As of ``one_rank_config``.
        tensors: torch tensors by their stored names.

    Raises:
        AdapterError: The configuration is invalid.
    """
    config, made = _parse(name, stored), dict(tensors)
    if not config.has_patterns:
        return made
    factors = {key: factor for key in tensors if (factor := factor_of(key))}
    rank = max(len(tensors[key]) for key, factor in factors.items() if factor.side == "A")
    common = _common_scaling(config)
    for key, factor in factors.items():
        tensor = tensors[key]
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
        _names_other_modules(stored) or stored.get("rank_pattern") or stored.get("alpha_pattern")
    )


def _names_other_modules(stored: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` may be other names than those of the adapted modules: a regular
    expression, or one of two modules that PEFT adapts together."""
    targets = stored.get("target_modules")
    is_expression = isinstance(targets, str) and targets not in ALL_LINEAR
    return is_expression or bool(stored.get(TIES_EMBEDDINGS))


def _parse(name: str, stored: Mapping[str, Any]) -> AdapterConfig:
    return parse_config(AdapterFolder(name, Path("request")), stored)


def _common_scaling(config: AdapterConfig) -> float:
    return config.scaling or 1.0  # a factor of 0 cannot be multiplied up


def _padded(tensor: Any, shape: tuple[int, int]) -> Any:
    """The matrix with zeros added at its ends, to ``shape``."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded
