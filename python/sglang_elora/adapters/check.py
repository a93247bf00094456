"""The static check of a LoRA adapter, made before anything is sent to the schedulers.

Stock SGLang accepts most broken adapters at load and fails in the scheduler at their first
batch, or serves them without part of their weights. ``check_adapter`` reads the configuration,
the file headers and then the data (a NaN crashes the sampler); its errors name file and reason. An
adapter with only some of q, k, v or gate, up passes: SGLang's fused layers get zeros for the rest.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_elora.adapters.base_shapes import BaseShapes, is_tower, layer_of
from sglang_elora.adapters.bounded_files import refused_not_raised
from sglang_elora.adapters.config_file import (
    ALL_LINEAR,
    INVOCATION,
    AdapterConfig,
    check_added_tokens,
    check_patterns,
    parse_config,
    read_config,
)
from sglang_elora.adapters.errors import AdapterError, AdapterFolder, Problem
from sglang_elora.adapters.experts import PARAMETERS, expert_of, is_nested
from sglang_elora.adapters.module_names import EMBEDDINGS, served_name, served_names
from sglang_elora.adapters.names import MAX_NAME_CHARS, name_problem
from sglang_elora.adapters.source import find_folder
from sglang_elora.adapters.tensor_rules import (
    Difference,
    LoraPair,
    check_shapes,
    factor_of,
    is_factor,
    num_unserved,
    pair_tensors,
)
from sglang_elora.adapters.weight_files import (
    CONFIG_FILE,
    TensorInfo,
    find_weight_files,
    load_tensors,
    read_tensors,
    unusable,
    unusable_tensors,
)

_DIVERGED = "Training diverged: use an earlier checkpoint"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Properties of an adapter that passed the check."""

    name: str
    folder: Path
    """Local folder, also for an adapter given by its Hugging Face id."""
    files: tuple[Path, ...]
    rank: int
    """The largest of its modules."""
    alpha: float
    scaling: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA; modules may have another by a pattern."""
    modules: frozenset[str]
    """Leaf names of the modules and parameters that have weights ("q_proj")."""
    num_parameters: int
    size_bytes: int
    """Bytes of the LoRA factors as stored, in the file's dtype."""
    num_dropped: int = 0
    """Stored factors of a vision or audio encoder, which are not served."""
    has_experts: bool = False
    """Whether some weights belong to experts of MoE layers."""

    @property
    def served_modules(self) -> frozenset[str]:
        """The modules by SGLang's fused names ("qkv_proj")."""
        return served_names(self.modules)


@refused_not_raised
def check_adapter(
    name: str,
    path: str,
    base: BaseShapes,
    *,
    max_rank: int | None = None,
    target_modules: Iterable[str] | None = None,
    drops_towers: bool = False,
    read_weights: bool = True,
) -> AdapterFacts:
    """Check an adapter against the base model and the server's limits.

    Args:
        name: The name it is served under.
        path: A local folder, or a Hugging Face id (downloaded if not cached; blocking).
        base: Shapes of the base model; if unknown, only ranks are compared.
        max_rank: The server's ``--max-lora-rank``.
        target_modules: The server's ``--lora-target-modules``, plain or fused names; "all"
            allows everything.
        drops_towers: Leave out weights of a vision or audio encoder instead of refusing the
            adapter.
        read_weights: Also read the data, and refuse NaN and values beyond float16's range;
            otherwise only headers are read.

    Raises:
        AdapterError: The adapter cannot be served; the text says which file, why, and what
            to do.
    """
    _check_name(name, path)
    folder = find_folder(name, path)
    config = read_config(folder)
    files = find_weight_files(folder)
    check_added_tokens(folder, base.vocab_size)
    tensors = read_tensors(folder, files)

    def difference(module: str, info: TensorInfo) -> str | None:
        """Reads the tensor, and the base model's."""
        (copy,) = load_tensors(folder, lambda name: name == info.name).values()
        return base.rows.difference(module, copy)

    facts = _check_parts(folder, config, base, tensors, difference, drops_towers=drops_towers)
    _check_limits(folder, config, facts, max_rank, target_modules)
    if read_weights:
        folder.raise_if_any(unusable_tensors(folder, files), _DIVERGED)
    return replace(facts, files=tuple(files))


@refused_not_raised
def read_adapter(name: str, path: str) -> dict[str, Any]:
    """The LoRA factors of an adapter that was checked before, as torch tensors by their stored
    names. Copies of the base model's embeddings, which the check compared, are left out.

    Raises:
        AdapterError: The folder or a file can no longer be read, or a weight is NaN or too large.
    """
    folder = find_folder(name, path)
    tensors = load_tensors(folder, is_factor)
    folder.raise_if_any(unusable("the weights", tensors.items()), _DIVERGED)
    return tensors


def content_digest(tensors: Mapping[str, Any]) -> str:
    """Hex digest of the tensors' names, dtypes, shapes and data; independent of files and order.

    Args:
        tensors: torch tensors in host memory, by their stored names.
    """
    torch: Any = importlib.import_module("torch")
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@refused_not_raised
def served_modules(name: str, path: str) -> frozenset[tuple[int | None, str]]:
    """(layer, SGLang's fused name) of the modules an adapter has weights for, from its files'
    headers. The layer is None outside of the layers.

    Modules of MoE experts are ``gate_up_proj_moe`` and ``down_proj_moe``.

    Raises:
        AdapterError: There is no such folder, or no file in it that can be read.
    """
    folder = find_folder(name, path)
    tensors = read_tensors(folder, find_weight_files(folder))
    paths = {factor.path for info in tensors if (factor := factor_of(info.name))}
    paths = {path for path in paths if not is_tower(path)}
    nested = {path for path in paths if is_nested(path)}
    found = {
        (layer_of(path), served_name(path) + ("_moe" if expert_of(path) else ""))
        for path in paths - nested
    }
    if nested:
        config = read_config(folder)
        for path in nested:
            if parameter := config.parameter_at(path):
                found.add((layer_of(path), f"{served_name(parameter)}_moe"))
    return frozenset(found)


@refused_not_raised
def stored_shapes(name: str, path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors by their stored names, from its files' headers.

    Raises:
        AdapterError: There is no such folder, or no file in it that can be read.
    """
    folder = find_folder(name, path)
    return {tensor.name: tensor.shape for tensor in read_tensors(folder, find_weight_files(folder))}


@refused_not_raised
def check_tensors(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    base: BaseShapes,
    *,
    max_rank: int | None = None,
    target_modules: Iterable[str] | None = None,
    drops_towers: bool = False,
) -> AdapterFacts:
    """``check_adapter`` for an adapter whose tensors arrive in a request.

    Args:
        config: Content of its adapter_config.json.
        tensors: Name -> torch tensor, whole (not sharded).

    Raises:
        AdapterError: As ``check_adapter``; the text says "request" for the folder.
    """
    _check_name(name, "request")
    folder = AdapterFolder(name, Path("request"))
    parsed = parse_config(folder, config)
    stored = [
        TensorInfo("tensors", key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]
    facts = _check_parts(
        folder,
        parsed,
        base,
        stored,
        lambda module, info: base.rows.difference(module, tensors[info.name]),
        drops_towers=drops_towers,
    )
    _check_limits(folder, parsed, facts, max_rank, target_modules)
    folder.raise_if_any(unusable("tensors", tensors.items()), _DIVERGED)
    return facts


def _check_name(name: str, where: str) -> None:
    if problem := name_problem(name):
        raise AdapterError(name[:MAX_NAME_CHARS], where, problem, "Give it another name")


def _check_parts(
    folder: AdapterFolder,
    config: AdapterConfig,
    base: BaseShapes,
    stored: Sequence[TensorInfo],
    difference: Difference,
    *,
    drops_towers: bool,
) -> AdapterFacts:
    """Check that configuration, tensors and base model agree; returns the adapter's facts."""
    folder.raise_if_any(
        [
            Problem(CONFIG_FILE, f"target_parameters is set to {t!r}, no parameter of MoE experts")
            for t in config.target_parameters
            if base.known and not base.has_parameter(t)
        ],
        "Remove the name from target_parameters, or serve the adapter with its own base model",
    )
    pairs = pair_tensors(folder, config, base, stored, difference, drops_towers=drops_towers)
    check_patterns(folder, config, (pair.stored_path for pair in pairs))
    check_shapes(folder, config, base, pairs)
    _check_targets(folder, config, base, pairs)
    if config.invocation:
        _check_activated(folder, config, base, pairs)
    tensors = [tensor for pair in pairs for tensor in pair.tensors]
    return AdapterFacts(
        name=folder.name,
        folder=folder.path,
        files=(),
        rank=max((pair.rank for pair in pairs), default=config.rank),
        alpha=config.alpha,
        scaling=config.scaling,
        modules=frozenset(_leaf(pair) for pair in pairs),
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        num_dropped=num_unserved(tensor.name for tensor in stored),
        has_experts=any(pair.is_of_experts for pair in pairs),
    )


def _check_targets(
    folder: AdapterFolder, config: AdapterConfig, base: BaseShapes, pairs: Sequence[LoraPair]
) -> None:
    """Check that the weights and target_modules name the same modules."""
    modules = [pair for pair in pairs if not pair.is_parameter]
    extra = sorted({_leaf(pair) for pair in modules if not config.targets(pair.stored_path)})
    folder.raise_if_any(
        [Problem(CONFIG_FILE, f"weights of {m!r} are not in target_modules") for m in extra],
        "Add the name to target_modules if it was trained, or save the adapter again",
    )
    leaves = {_leaf(pair) for pair in pairs}
    unknown = [
        target
        for target in config.target_modules or ()
        if base.known
        and not base.has_target(target)
        and served_name(target) not in served_names(leaves)
    ]
    folder.raise_if_any(
        [
            Problem(CONFIG_FILE, f"target module {t!r} has no weights and no base module")
            for t in unknown
        ],
        "Remove the name from target_modules, or serve the adapter with its own base model",
    )


def _check_activated(
    folder: AdapterFolder, config: AdapterConfig, base: BaseShapes, pairs: Sequence[LoraPair]
) -> None:
    """Check that an activated LoRA only has weights for linear layers, as in PEFT, and can be
    invoked."""
    leaves = {_leaf(pair) for pair in pairs}
    refused = {*(leaves & EMBEDDINGS), *(["MoE experts"] if config.target_parameters else [])}
    folder.raise_if_any(
        [
            Problem(CONFIG_FILE, f"{INVOCATION} is set, and it has weights for {module}")
            for module in sorted(refused)
        ],
        "Train it on linear layers of the model's layers only",
    )
    outside = [t for t in config.invocation if base.vocab_size is not None and t >= base.vocab_size]
    folder.raise_if_any(
        [Problem(CONFIG_FILE, f"{INVOCATION} has token {token}") for token in outside[:1]],
        f"Serve it with its own base model; this one has {base.vocab_size} tokens",
    )


def _leaf(pair: LoraPair) -> str:
    return pair.path.rsplit(".", 1)[-1]


def _check_limits(
    folder: AdapterFolder,
    config: AdapterConfig,
    facts: AdapterFacts,
    max_rank: int | None,
    target_modules: Iterable[str] | None,
) -> None:
    needed = facts.served_modules
    if facts.has_experts:
        needed |= frozenset(PARAMETERS)  # SGLang adapts experts only if both are target modules
    if not facts.num_dropped:  # otherwise modules of an encoder are named, too
        needed |= served_names(config.target_modules or ())
    if max_rank is not None and facts.rank > max_rank:
        raise folder.error(
            CONFIG_FILE,
            f"its rank r={facts.rank} is above the server's --max-lora-rank {max_rank}",
            f"Start the server with --max-lora-rank {facts.rank} or more",
        )
    allowed = frozenset(target_modules) if target_modules is not None else None
    if allowed is None or allowed & ALL_LINEAR:
        return
    outside = sorted(needed - served_names(allowed))
    if outside:
        experts = " (MoE experts need both gate_up_proj and down_proj)" if facts.has_experts else ""
        raise folder.error(
            CONFIG_FILE,
            f"it adapts {', '.join(outside)}{experts}, outside the server's "
            f"--lora-target-modules {' '.join(sorted(allowed))}",
            "Start the server with --lora-target-modules "
            f"{' '.join(sorted(served_names(allowed) | needed))}, or with 'all'",
        )
