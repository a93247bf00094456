"""The factors of MoE experts by the names that SGLang reads: one matrix for each expert.

PEFT's parameter of all experts of a layer has A ``[experts * rank, in]``, whose rows are sorted by
expert, and B ``[out, rank * experts]``, in whose columns the expert changes fastest. Source:
``ParamWrapper.get_delta_factors`` of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sglang_elora.adapters.config_file import AdapterConfig
from sglang_elora.adapters.errors import AdapterFolder
from sglang_elora.adapters.experts import PROJECTIONS, expert_of, is_nested
from sglang_elora.adapters.tensor_rules import Factor, factor_of
from sglang_elora.adapters.weight_files import CONFIG_FILE

_SAVE_AGAIN = "Save the adapter again"
_MAX_EXPERTS = 4096  # of a layer; Kimi K2 has 384


class Part(NamedTuple):
    """A tensor to serve, or a part of one."""

    name: str
    factor: Factor | None
    """Whose path PEFT's patterns match; None if the tensor is no factor."""
    tensor: Any


def pattern_path(folder: AdapterFolder, config: AdapterConfig, path: str) -> str:
    """The path that PEFT's patterns match for factors stored at a path.

    Raises:
        AdapterError: ``target_parameters`` does not say which parameter of experts it is.
    """
    if not is_nested(path):
        return path
    parameter = config.parameter_at(path)
    if parameter is None:
        text = f"target_parameters names no parameter for the weights of {path}"
        raise folder.error(CONFIG_FILE, text, _SAVE_AGAIN)
    return parameter


def parts_of(
    folder: AdapterFolder, config: AdapterConfig, tensors: Mapping[str, Any]
) -> Iterator[Part]:
    """The tensors, those of all experts of a layer split into views, one for each expert, and those
    of one expert under the usual name of their projection.

    Args:
        tensors: torch tensors by their stored names.

    Raises:
        AdapterError: Rows of A or columns of B are no multiple of the rank, A and B have parts for
            different numbers of experts, or it is unknown which parameter they belong to.
    """
    counts: dict[str, int] = {}  # experts by parameter
    for key, tensor in tensors.items():
        factor = factor_of(key)
        if factor is None:
            yield Part(key, None, tensor)
        elif is_nested(factor.path):
            path = pattern_path(folder, config, factor.path)
            rank = config.rank_of(path)
            shape = tuple(tensor.shape)
            count, rest = divmod(shape[factor.side == "B"] if len(shape) == 2 else 0, rank)
            if rest or not 0 < count <= _MAX_EXPERTS or counts.setdefault(path, count) != count:
                text = f"{key} has shape {list(shape)}, adapter_config.json says r={rank}"
                raise folder.error(CONFIG_FILE, text, _SAVE_AGAIN)
            named = Factor(path, factor.side, is_embedding=False)
            yield from _split(key[: key.index(factor.path)], named, tensor, count)
        else:
            yield Part(_renamed(key, factor), factor, tensor)


def _split(prefix: str, factor: Factor, tensor: Any, count: int) -> Iterator[Part]:
    """The parts of A ``[count * rank, in]`` or B ``[out, rank * count]``, as views."""
    parent, _, parameter = factor.path.rpartition(".")
    if factor.side == "A":
        parts = tensor.unflatten(0, (count, len(tensor) // count))
    else:
        parts = tensor.unflatten(1, (tensor.shape[1] // count, count)).permute(2, 0, 1)
    for index, part in enumerate(parts):
        name = f"{prefix}{parent}.{index}.{parameter}.lora_{factor.side}.weight"
        yield Part(name, factor, part)


def _renamed(key: str, factor: Factor) -> str:
    """The name with gate_proj, up_proj or down_proj for Mixtral's w1, w3 or w2."""
    expert = expert_of(factor.path)
    if expert is None or factor.path.endswith(expert.projection):
        return key
    parent, _, leaf = factor.path.rpartition(".")
    return key.replace(f"{parent}.{leaf}.", f"{parent}.{PROJECTIONS[leaf]}.", 1)
