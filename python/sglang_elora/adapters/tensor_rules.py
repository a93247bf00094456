"""Pairing of stored tensors into A and B of base modules, with the reasons for refusing some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from sglang_elora.adapters.base_shapes import (
    BaseShapes,
    ModuleShape,
    canonical,
    is_tower,
    layer_of,
)
from sglang_elora.adapters.config_file import AdapterConfig
from sglang_elora.adapters.errors import MERGE, SHOWN, AdapterFolder, Problem
from sglang_elora.adapters.experts import expert_of, is_like_experts, is_nested
from sglang_elora.adapters.module_names import EMBEDDINGS
from sglang_elora.adapters.weight_files import TensorInfo

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.default)?(?P<weight>\.weight)?"
)
_OF_TRAINING = ".lora_velora_embed"  # VeLoRA's; what it computes is plain LoRA
_MAX_COPIES = 4  # of embed_tokens and lm_head; each is read and compared
_RETRAIN = f"Train the adapter without it. Or: {MERGE}"
Difference: TypeAlias = Callable[[str, TensorInfo], "str | None"]
"""How a stored tensor differs from the base model's weight of a module; None if it is equal."""


@dataclass(frozen=True, slots=True)
class Factor:
    """What the name of a stored tensor says: one of a module's two matrices."""

    path: str  # of the module, as stored; PEFT's patterns match this path
    side: str  # "A" or "B"
    is_embedding: bool


def factor_of(name: str) -> Factor | None:
    """The LoRA factor that a stored tensor of that name is; None if it is none."""
    match = _LORA_KEY.fullmatch(name.removeprefix(_PREFIX))
    if match is None:
        return None
    is_embedding = "embedding" in match["kind"]
    # PEFT writes "q_proj.lora_A.weight" but "embed_tokens.lora_embedding_A".
    if match["weight"] is None and not is_embedding:
        return None
    return Factor(match["path"], match["kind"][-1], is_embedding)


def is_factor(name: str) -> bool:
    """Whether a stored tensor of that name is A or B of a module of the language model."""
    factor = factor_of(name)
    return factor is not None and not is_tower(factor.path)


def num_unserved(names: Iterable[str]) -> int:
    """How many of an adapter's stored tensors are A or B of a module that is not served."""
    factors = (factor_of(name) for name in names)
    return sum(factor is not None and is_tower(factor.path) for factor in factors)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapted module, with its A and B if present."""

    stored_path: str
    """As in the file, or of a parameter of experts; PEFT's patterns match this path."""
    path: str
    """As in the base model; as in the file if the base model's modules are unknown."""
    shape: ModuleShape | None  # None if the base model's shapes are unknown
    a: TensorInfo | None
    b: TensorInfo | None

    @property
    def tensors(self) -> list[TensorInfo]:
        return [tensor for tensor in (self.a, self.b) if tensor is not None]

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter of all experts of a layer, not a module."""
        return self.shape is not None and self.shape.num_experts > 0

    @property
    def num_parts(self) -> int:
        """Number of experts whose factors each tensor holds."""
        return self.shape.num_experts if self.shape and self.is_parameter else 1

    @property
    def rank(self) -> int:
        """The number of rows of A, per expert."""
        return 0 if self.a is None else self.a.shape[0] // self.num_parts

    @property
    def is_of_experts(self) -> bool:
        return is_like_experts(self.path)


_Modules: TypeAlias = Mapping[str, "tuple[str, ModuleShape] | None"]
"""By stored path, what ``BaseShapes.find`` says."""


class _Found(NamedTuple):
    """A stored factor."""

    tensor: TensorInfo
    path: str  # as ``LoraPair.stored_path``
    side: str  # "A" or "B"


def pair_tensors(
    folder: AdapterFolder,
    config: AdapterConfig,
    base: BaseShapes,
    tensors: Sequence[TensorInfo],
    difference: Difference,
    *,
    drops_towers: bool = False,
) -> list[LoraPair]:
    """Group tensors by base module.

    ``difference`` is called with embeddings that are saved whole; unchanged copies are skipped, and
    so are factors of vision and audio encoders with ``drops_towers``.

    Raises AdapterError on a tensor that is not a LoRA factor, is not floating-point, has no module
    in the base model, or lacks its other half.
    """
    factors, others = _split(tensors)
    if drops_towers and any(is_factor(tensor.name) for tensor in tensors):
        factors = [found for found in factors if not is_tower(found.path)]
    paths = {canonical(found.path) for found in factors} if others else set()
    if sum(copied_module(tensor.name) is not None for tensor in others) > _MAX_COPIES:
        text = f"it holds more than {_MAX_COPIES} copies of embeddings"
        raise folder.error(others[0].file, text, _RETRAIN)
    refused: list[Problem] = []
    for tensor in others:
        if _is_frozen_copy(tensor, paths, base) or tensor.name.endswith(_OF_TRAINING):
            continue
        # The reason takes a search in modules_to_save, and only the first ones are shown.
        shown = config if len(refused) < SHOWN else None
        problem = _why_refused(tensor, shown, difference)
        if problem is not None:
            refused.append(Problem(tensor.file, problem))
    folder.raise_if_any(refused, _RETRAIN)
    folder.raise_if_any(
        [
            Problem(t.file, f"{t.name} has dtype {t.dtype}, not a floating-point type")
            for t in (found.tensor for found in factors)
            if not t.is_float
        ],
        "Save the adapter in bfloat16, float16 or float32",
    )
    folder.raise_if_any(list(_unserved_modules(factors, base)), _RETRAIN)
    factors = _named_by_parameter(folder, config, factors, base)
    modules = {path: base.find(path) for path in {found.path for found in factors}}
    unknown = list(_unknown_modules(factors, modules, base))
    folder.raise_if_any(unknown, _other_base_remedy(config))
    pairs = _pairs(folder, factors, modules)
    folder.raise_if_any(
        [_half(pair) for pair in pairs if pair.a is None or pair.b is None],
        "Save the adapter again: A and B belong together",
    )
    return pairs


def check_shapes(
    folder: AdapterFolder, config: AdapterConfig, base: BaseShapes, pairs: Sequence[LoraPair]
) -> None:
    """Check that each A is [rank, in_size] and each B is [out_size, rank]; with ``num_parts`` times
    the rank for a parameter of experts."""
    ranks: list[Problem] = []
    sizes: list[Problem] = []
    vocab: list[Problem] = []
    for pair in pairs:
        for tensor, rank_axis in ((pair.a, 0), (pair.b, 1)):
            assert tensor is not None, f"unpaired {pair.path}"
            if len(tensor.shape) != 2 or tensor.num_elements == 0:
                text = f"{tensor.name} has shape {list(tensor.shape)}, not a matrix"
                sizes.append(Problem(tensor.file, text))
                continue
            rank, size = tensor.shape[rank_axis], tensor.shape[1 - rank_axis]
            stated = config.rank_of(pair.stored_path)
            if rank != stated * pair.num_parts:
                parts = f" for {pair.num_parts} experts" if pair.num_parts > 1 else ""
                text = f"{tensor.name} has rank {rank}{parts}, adapter_config.json says r={stated}"
                ranks.append(Problem(tensor.file, text))
            side = "input" if rank_axis == 0 else "output"
            wanted = _size_of(pair.shape, side)
            if wanted is not None and size != wanted:
                text = f"{tensor.name} has {side} size {size}, the base module has {wanted}"
                grown = wanted == base.vocab_size and size > wanted
                (vocab if grown else sizes).append(Problem(tensor.file, text))
    folder.raise_if_any(
        vocab, f"The adapter was trained with added tokens, which are not served. {MERGE}"
    )
    folder.raise_if_any(sizes, _other_base_remedy(config))
    folder.raise_if_any(
        ranks,
        "Correct r, lora_alpha and the patterns in adapter_config.json, or save the adapter again",
    )


def _split(tensors: Sequence[TensorInfo]) -> tuple[list[_Found], list[TensorInfo]]:
    """Split tensors into LoRA factors and all others."""
    factors, others = [], []
    for tensor in tensors:
        factor = factor_of(tensor.name)
        if factor is None:
            others.append(tensor)
        else:
            factors.append(_Found(tensor, factor.path, factor.side))
    return factors, others


def _is_frozen_copy(tensor: TensorInfo, paths: set[str], base: BaseShapes) -> bool:
    """Whether this is an embedding's base weight, which PEFT saves with LoRA factors *of it*.

    Such a weight was not trained and is skipped. One of another shape was resized: not skipped.
    """
    path = tensor.name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    if path.rsplit(".", 1)[-1] not in EMBEDDINGS or canonical(path) not in paths:
        return False
    found = base.find(path)
    return found is None or sorted(tensor.shape) == sorted((found[1].in_size, found[1].out_size))


def _why_refused(
    tensor: TensorInfo, config: AdapterConfig | None, difference: Difference
) -> str | None:
    """Why a tensor that is no LoRA factor is refused, in short without a configuration; None for a
    copy of the base model's."""
    module = copied_module(tensor.name)
    if module is None or not tensor.is_float or len(tensor.shape) != 2:
        return tensor.name if config is None else _why_not_lora(tensor.name, config)
    problem = difference(module, tensor)
    return problem and f"{tensor.name} is a saved embedding, not served: {problem}"


def copied_module(name: str) -> str | None:
    """The embedding that a stored tensor of that name may be a whole copy of."""
    if not name.endswith(".weight"):
        return None
    path = name.removeprefix(_PREFIX).removesuffix(".weight")
    for wrapper in (".base_layer", ".modules_to_save.default", ".original_module"):
        path = path.removesuffix(wrapper)
    leaf = canonical(path).rsplit(".", 1)[-1]
    return leaf if leaf in EMBEDDINGS else None


def _why_not_lora(name: str, config: AdapterConfig) -> str:
    path = name.removeprefix(_PREFIX)
    if "lora_magnitude_vector" in path:
        return f"{name} belongs to DoRA, which is not served"
    if "trainable_tokens" in path:
        return f"{name} holds trained token embeddings (trainable_token_indices), not served"
    if ".lora_" in path and path.endswith(".bias"):
        return f"{name} is a bias of a LoRA factor (lora_bias), not served"
    if path.endswith(".bias"):
        return f"{name} is a trained bias, not served"
    if any(f"{module}." in path for module in config.modules_to_save):
        return f"{name} is a fully trained module (modules_to_save), not served"
    return f"{name} is not a LoRA factor of a module"


def _unserved_modules(factors: Sequence[_Found], base: BaseShapes) -> Iterator[Problem]:
    reasons: dict[str, str | None] = {}
    for tensor, path, _ in factors:
        if path not in reasons:
            reasons[path] = _why_unserved(path, base)
        reason = reasons[path]
        if reason is None and "lora_embedding" in tensor.name and is_like_experts(path):
            reason = "belongs to MoE experts, which are no embedding"
        if reason is not None:
            text = f"{tensor.name} {reason}, where LoRA is not served"
            yield Problem(tensor.file, text)


def _why_unserved(path: str, base: BaseShapes) -> str | None:
    if is_tower(path):
        return "belongs to a vision or audio encoder"
    if path.rsplit(".", 1)[-1] == "gate":
        return "belongs to the router of MoE experts"
    if not is_like_experts(path):
        return None
    if not is_nested(path) and expert_of(path) is None:
        return "belongs to no projection of MoE experts"
    reason = base.why_unserved(path)
    return reason and f"belongs to MoE experts, and {reason}"


def _named_by_parameter(
    folder: AdapterFolder, config: AdapterConfig, factors: Sequence[_Found], base: BaseShapes
) -> list[_Found]:
    """The factors, with the path of its parameter for each that belongs to all experts of a layer.

    Raises:
        AdapterError: ``target_parameters`` does not say which parameter it is, other factors belong
            to one expert each, or the number of experts is unknown.
    """
    nested = {found.path for found in factors if is_nested(found.path)}
    if not nested:
        return list(factors)
    parameters = {path: config.parameter_at(path) for path in nested}
    problems = []
    for found in factors:
        if found.path in nested and parameters[found.path] is None:
            text = f"{found.tensor.name} belongs to no parameter that target_parameters names"
            problems.append(Problem(found.tensor.file, text))
    folder.raise_if_any(problems, "Correct target_parameters, or save the adapter again")
    single = [found for found in factors if expert_of(found.path)]
    if single:
        text = f"{single[0].tensor.name} belongs to one expert, and other weights to all experts"
        raise folder.error(single[0].tensor.file, text, "Save the adapter again, in one form")
    if not base.known:
        text = (
            f"weights of all experts need the base model's shapes, which are unknown: {base.reason}"
        )
        raise folder.error(factors[0].tensor.file, text, MERGE)
    return [found._replace(path=parameters.get(found.path) or found.path) for found in factors]


def _unknown_modules(
    factors: Sequence[_Found], modules: _Modules, base: BaseShapes
) -> Iterator[Problem]:
    seen: set[str] = set()
    for tensor, path, _ in factors:
        if path in seen:
            continue
        seen.add(path)
        layer = layer_of(path)
        if layer is not None and base.num_layers is not None and layer >= base.num_layers:
            reason = f"{path} is in layer {layer}, the base model has layers 0 to "
            yield Problem(tensor.file, f"{reason}{base.num_layers - 1}")
        elif base.known and modules[path] is None:
            if number := base.num_experts(path):
                reason = (
                    f"{path} is of an expert that is not there: the base model has experts 0 to "
                )
                yield Problem(tensor.file, f"{reason}{number - 1}")
            else:
                what = "MoE experts" if is_like_experts(path) else "linear module"
                yield Problem(tensor.file, f"the base model has no {what} {path}")


def _other_base_remedy(config: AdapterConfig) -> str:
    name = config.base_model_name
    trained = f", it was trained on {name!r}" if name else ""
    return f"Is this an adapter of another base model{trained}? Serve it with its own base model"


def _pairs(folder: AdapterFolder, factors: Sequence[_Found], found: _Modules) -> list[LoraPair]:
    keys: dict[str, str] = {}  # by stored path: equal for all spellings of one module
    slots: dict[str, dict[str, TensorInfo]] = {}
    modules: dict[str, tuple[str, str, ModuleShape | None]] = {}
    twice = []
    for tensor, path, side in factors:
        if path not in keys:
            own, shape = found[path] or (path, None)
            keys[path] = key = own if shape is not None else canonical(own)
            modules[key] = (path, own, shape)
        halves = slots.setdefault(keys[path], {})
        if side in halves:
            text = f"{tensor.name} and {halves[side].name} are the same factor"
            twice.append(Problem(tensor.file, text))
        halves[side] = tensor
    folder.raise_if_any(twice, "Keep one of them")
    return [
        LoraPair(*modules[key], a=halves.get("A"), b=halves.get("B"))
        for key, halves in slots.items()
    ]


def _half(pair: LoraPair) -> Problem:
    present, missing = (pair.a, "B") if pair.a is not None else (pair.b, "A")
    assert present is not None
    return Problem(present.file, f"{present.name} has no matching lora_{missing}")


def _size_of(shape: ModuleShape | None, side: str) -> int | None:
    if shape is None:
        return None
    return shape.in_size if side == "input" else shape.out_size
