"""Shapes of the base model's modules by path, computed without reading weights."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_elora.adapters.base_rows import BaseRows

# Path components that depend on the transformers class that wraps the text model: the same layer
# may be "model.layers.0", "language_model.model.layers.0" or "model.language_model.layers.0".
_WRAPPERS = frozenset({"model", "language_model", "text_model"})
_TOWER = re.compile(r"(^|_)(visual|vision|audio|speech|image|img|mm|multi_modal)(_|$)")
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

    An embedding maps one-hot rows, so its in_size is the number of embeddings.
    """

    in_size: int
    out_size: int
    is_embedding: bool = False


@dataclass(frozen=True)
class BaseShapes:
    """Linear and embedding modules of one base model; computed once per process.

    ``reason`` is set if transformers cannot build the model: ``modules`` is then empty and
    checks compare no shapes (the caller logs the reason).
    """

    modules: Mapping[str, ModuleShape]
    vocab_size: int | None = None
    num_layers: int | None = None
    reason: str | None = None
    rows: BaseRows = field(default=BaseRows(None), compare=False)
    """To compare copies of embeddings with."""
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
                return cls(modules=dict(_shapes_of(model)), **sizes)
        return cls(modules={}, reason="; ".join(failures), **sizes)

    def find(self, path: str) -> tuple[str, ModuleShape] | None:
        """Path and shape of the base module that an adapter calls ``path``, ignoring wrapper
        components; None if there is none or more than one."""
        shape = self.modules.get(path)
        if shape is not None:
            return path, shape
        found = self._aliases.get(canonical(path))
        return None if found is None else (found, self.modules[found])

    def has_target(self, target: str) -> bool:
        """Whether an entry of PEFT's ``target_modules`` names any module of the model."""
        wanted = canonical(target)
        return any(names_module(wanted, alias) for alias in self._aliases)


def names_module(target: str, path: str) -> bool:
    """Whether a target matches a path by PEFT's rule: the whole path or its last components."""
    return path == target or path.endswith("." + target)


def layer_of(path: str) -> int | None:
    match = _LAYER.search(path + ".")
    return int(match.group(1)) if match else None


def is_tower(path: str) -> bool:
    """Whether the module belongs to a vision or audio encoder or its projector."""
    return any(_TOWER.search(part) for part in path.split("."))


def canonical(path: str) -> str:
    """The path without wrapper components: equal for all spellings of one module."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    # "unembed_tokens" is the output layer in adapters of some trainers; SGLang accepts it.
    return ".".join("lm_head" if part == "unembed_tokens" else part for part in parts)


def _local_folder(model_path: str, revision: str | None) -> Path | None:
    """The folder of a model given by its path or by a Hugging Face id that is in the cache."""
    if Path(model_path).is_dir():
        return Path(model_path)
    hub: Any = importlib.import_module("huggingface_hub")
    found = hub.try_to_load_from_cache(model_path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _shapes_of(model: Any) -> list[tuple[str, ModuleShape]]:
    torch: Any = importlib.import_module("torch")
    conv1d: Any = importlib.import_module("transformers.pytorch_utils").Conv1D
    shapes = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes.append((path, ModuleShape(module.in_features, module.out_features)))
        elif isinstance(module, torch.nn.Embedding):
            shape = ModuleShape(module.num_embeddings, module.embedding_dim, is_embedding=True)
            shapes.append((path, shape))
        elif isinstance(module, conv1d):  # GPT-2's linear layer; its weight is transposed
            in_size, out_size = module.weight.shape
            shapes.append((path, ModuleShape(in_size, out_size)))
    return shapes


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
