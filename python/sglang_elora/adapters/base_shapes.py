"""Shapes of the base model's modules by path, computed without reading weights."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_elora.adapters.base_rows import BaseRows
from sglang_elora.adapters.experts import (
    DOWN,
    GATE_UP,
    PARAMETERS,
    PROJECTIONS,
    expert_of,
)
from sglang_elora.adapters.module_names import endings

# Path components that depend on the transformers class that wraps the text model: the same layer
# may be "model.layers.0", "language_model.model.layers.0" or "model.language_model.layers.0".
_WRAPPERS = frozenset({"model", "language_model", "text_model"})
# Other names of a component, in adapters: "unembed_tokens" is some trainers' output layer, which
# SGLang accepts; transformers 4 called the MoE layers of some models "block_sparse_moe".
_RENAMED = {"unembed_tokens": "lm_head", "block_sparse_moe": "mlp"}
_TOWER = re.compile(r"(?:^|[._])(?:visual|vision|audio|speech|image|img|mm|multi_modal)(?:[._]|$)")
_INDEX = re.compile(r"(?<![^.])experts\.[0-9]+\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
# Auto class -> its table of model types. Checked first, because asking an auto class for a type it
# lacks is slow: to format its error message it imports every model of transformers.
_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

# Errors that model constructors, possibly remote code, are known to raise.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Input and output size of a module, as LoRA sees it: A is [rank, in_size], B [out_size, rank].

    An embedding maps one-hot rows, so its in_size is the number of embeddings. A parameter of all
    experts of an MoE layer, ``[num_experts, out_size, in_size]``, has an A of ``[num_experts *
    rank, in_size]`` and a B of ``[out_size, rank * num_experts]``.
    """

    in_size: int
    out_size: int
    is_embedding: bool = False
    num_experts: int = 0  # 0: it is a module of its own


@dataclass(frozen=True)
class BaseShapes:
    """Linear and embedding modules, and parameters of MoE experts, of one base model; computed once
    per process.

    ``reason`` is set if transformers cannot build the model: ``modules`` is then empty and
    checks compare no shapes (the caller logs the reason).
    """

    modules: Mapping[str, ModuleShape]
    vocab_size: int | None = None
    num_layers: int | None = None
    reason: str | None = None
    rows: BaseRows = field(default=BaseRows(None), compare=False)
    """To compare copies of embeddings with."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Paths of modules of experts whose layout is not served -> why."""
    _aliases: dict[str, str | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        aliases: dict[str, str | None] = {}
        for path in self.modules:
            alias = canonical(path)
            aliases[alias] = None if alias in aliases else path  # None: ambiguous
        object.__setattr__(self, "_aliases", aliases)

    @property
    def known(self) -> bool:
        return self.reason is None

    @classmethod
    def unknown(cls, reason: str) -> BaseShapes:
        return cls(modules={}, reason=reason)

    @classmethod
    def from_pretrained(
        cls, model_path: str, *, trust_remote_code: bool = False, revision: str | None = None
    ) -> BaseShapes:
        """The shapes of a model built on the meta device (0.2 to 1.2 s, no weights are read).

        Never raises for an architecture it cannot build: see ``reason``.
        """
        try:
            transformers: Any = importlib.import_module("transformers")
            config = transformers.AutoConfig.from_pretrained(
                model_path, trust_remote_code=trust_remote_code, revision=revision
            )
        except _BUILD_ERRORS as error:
            return cls.unknown(f"no configuration of {model_path!r}: {_one_line(error)}")
        found = cls.from_config(config, trust_remote_code=trust_remote_code)
        return replace(found, rows=BaseRows(_local_folder(model_path, revision)))

    @classmethod
    def from_config(cls, config: Any, *, trust_remote_code: bool = False) -> BaseShapes:
        """The shapes as by ``from_pretrained``, for a transformers configuration."""
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        text = config.get_text_config()
        sizes: dict[str, Any] = {
            "vocab_size": getattr(text, "vocab_size", None),
            "num_layers": getattr(text, "num_hidden_layers", None),
        }
        tables: Any = importlib.import_module("transformers.models.auto.modeling_auto")
        remote = getattr(config, "auto_map", None) or {}
        failures = []
        for name, table in _CLASSES.items():
            if config.model_type not in getattr(tables, table) and name not in remote:
                failures.append(f"{name} does not know model type {config.model_type!r}")
                continue
            try:
                with torch.device("meta"):
                    model = getattr(transformers, name).from_config(
                        config, trust_remote_code=trust_remote_code, attn_implementation="eager"
                    )
            except _BUILD_ERRORS as error:
                failures.append(f"{name}: {_one_line(error)}")
            else:
                modules, unserved = _shapes_of(model)
                return cls(modules=modules, unserved=unserved, **sizes)
        return cls(modules={}, reason="; ".join(failures), **sizes)

    def find(self, path: str) -> tuple[str, ModuleShape] | None:
        """Path and shape of the base module that an adapter calls ``path``, ignoring wrapper
        components; None if there is none or more than one. Of an expert that is a part of a
        parameter, the path is as if it had a module of its own."""
        shape = self.modules.get(path)
        if shape is not None:
            return path, shape
        found = self._aliases.get(canonical(path))
        return self._find_expert(path) if found is None else (found, self.modules[found])

    def num_experts(self, path: str) -> int | None:
        """Number of experts in the layer of an expert's projection; None if the path is of another
        module, or if experts are modules of their own."""
        expert = expert_of(path)
        found = None if expert is None else self.find(expert.parameter)
        return found[1].num_experts if found else None

    def why_unserved(self, path: str) -> str | None:
        """Why LoRA is not served on the experts that a path belongs to; None if it is, or if the
        path belongs to no experts."""
        if not self.unserved:
            return None
        head, found, _ = f"{canonical(path)}.".rpartition("experts.")
        return self._unserved.get(f"{head}experts") if found else None

    def has_target(self, target: str) -> bool:
        """Whether an entry of PEFT's ``target_modules`` names any module of the model, also one of
        an expert that is a part of a parameter."""
        wanted = canonical(target)
        head, dot, leaf = wanted.rpartition(".")
        renamed = f"{head}{dot}{PROJECTIONS.get(leaf, leaf)}"
        return wanted in self._targets or _INDEX.sub("experts.", renamed) in self._targets

    def has_parameter(self, target: str) -> bool:
        """Whether an entry of PEFT's ``target_parameters`` names a parameter of experts, served or
        not."""
        return canonical(target) in self._parameters

    @cached_property
    def _targets(self) -> frozenset[str]:
        """Everything that ``target_modules`` may say to name a module, indices of experts left
        out."""
        paths: list[str] = []
        for alias, path in self._aliases.items():
            if path is None or not self.modules[path].num_experts:
                paths.append(_INDEX.sub("experts.", alias))
                continue
            parent, _, leaf = alias.rpartition(".")
            names = (DOWN,) if leaf == DOWN else ("gate_proj", "up_proj")
            paths += [f"{parent}.{name}" for name in names]
        return frozenset(ending for path in set(paths) for ending in endings(path))

    @cached_property
    def _parameters(self) -> frozenset[str]:
        """Everything that ``target_parameters`` may say to name a parameter of experts."""
        paths = [path for path, shape in self.modules.items() if shape.num_experts]
        paths += [f"{path}.{name}" for path in self.unserved for name in PARAMETERS]
        return frozenset(ending for path in paths for ending in endings(canonical(path)))

    @cached_property
    def _unserved(self) -> Mapping[str, str]:
        return {canonical(path): why for path, why in self.unserved.items()}

    def _find_expert(self, path: str) -> tuple[str, ModuleShape] | None:
        expert = expert_of(path)
        found = None if expert is None else self._aliases.get(canonical(expert.parameter))
        if expert is None or found is None:
            return None
        whole = self.modules[found]
        if expert.number >= whole.num_experts:
            return None
        out_size = whole.out_size if expert.projection == DOWN else whole.out_size // 2
        parent = found.rpartition(".")[0]
        own = f"{parent}.{expert.number}.{expert.projection}"
        return own, ModuleShape(whole.in_size, out_size)


def layer_of(path: str) -> int | None:
    match = _LAYER.search(path + ".")
    return int(match.group(1)) if match else None


def is_tower(path: str) -> bool:
    """Whether the module belongs to a vision or audio encoder or its projector."""
    return _TOWER.search(path) is not None


def canonical(path: str) -> str:
    """The path without wrapper components: equal for all spellings of one module."""
    parts = [_RENAMED.get(part, part) for part in path.split(".") if part not in _WRAPPERS]
    if len(parts) > 2 and parts[-3] == "experts":
        parts[-1] = PROJECTIONS.get(parts[-1], parts[-1])
    return ".".join(parts)


def _local_folder(model_path: str, revision: str | None) -> Path | None:
    """The folder of a model given by its path or by a Hugging Face id that is in the cache."""
    if Path(model_path).is_dir():
        return Path(model_path)
    hub: Any = importlib.import_module("huggingface_hub")
    found = hub.try_to_load_from_cache(model_path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _shapes_of(model: Any) -> tuple[dict[str, ModuleShape], dict[str, str]]:
    """Shapes of the model's modules, and why LoRA is not served on some modules of experts."""
    torch: Any = importlib.import_module("torch")
    conv1d: Any = importlib.import_module("transformers.pytorch_utils").Conv1D
    shapes: dict[str, ModuleShape] = {}
    unserved: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[path] = ModuleShape(module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            shape = ModuleShape(module.num_embeddings, module.embedding_dim, is_embedding=True)
            shapes[path] = shape
        elif isinstance(module, conv1d):  # GPT-2's linear layer; its weight is transposed
            in_size, out_size = module.weight.shape
            shapes[path] = ModuleShape(in_size, out_size)
        elif path.rsplit(".", 1)[-1] == "experts":
            own = {
                name: tuple(weight.shape) for name, weight in module.named_parameters(recurse=False)
            }
            if reason := _why_unserved(own, getattr(module, "is_transposed", False)):
                unserved[path] = reason
                continue
            for name, (num_experts, out_size, in_size) in own.items():
                shape = ModuleShape(in_size, out_size, num_experts=num_experts)
                shapes[f"{path}.{name}"] = shape
    return shapes, unserved


def _why_unserved(shapes: Mapping[str, tuple[int, ...]], is_transposed: bool) -> str | None:
    """Why LoRA is not served on experts with these parameters. Their order counts: by it PEFT
    decides which of them the stored factors belong to."""
    if not shapes:
        return None  # modules of their own
    names = f"its experts have the parameters {', '.join(shapes)}"
    if tuple(shapes) != PARAMETERS or any(len(shape) != 3 for shape in shapes.values()):
        return f"{names}, not gate_up_proj and down_proj"
    (_, up_out, up_in), (_, down_out, down_in) = shapes[GATE_UP], shapes[DOWN]
    if is_transposed or up_in != down_out or up_out != 2 * down_in:
        return "the parameters of its experts are stored transposed"
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
