"""adapter_config.json: the fields that are read, and the PEFT options that are refused.

Covers every field of peft 0.21's LoraConfig. Accepted and ignored, because they do not change the
forward ``W x + scaling * B A x``: training options (lora_dropout, exclude_modules,
layers_to_transform, layers_pattern, eva_config, velora_config, runtime_config, megatron_*), and
fan_in_fan_out, which says how the *base* weight is stored and matters only for merging.
modules_to_save and ``bias`` are refused by their tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_elora.adapters.bounded_files import MAX_JSON_BYTES, MAX_TOKENS_BYTES, read_bounded
from sglang_elora.adapters.errors import MERGE, AdapterFolder, Problem
from sglang_elora.adapters.experts import PARAMETERS, parameter_at
from sglang_elora.adapters.module_names import EMBEDDINGS, endings
from sglang_elora.adapters.module_patterns import ModulePattern
from sglang_elora.adapters.weight_files import ADDED_TOKENS_FILE, CONFIG_FILE

MAX_SCALING = 4096.0
"""Largest accepted alpha / r. Trained adapters have 0.5 to 64; with much larger ones, 16-bit
products overflow."""

_MAX_RANK = 1 << 16
_MAX_COMPARED = 1 << 21  # pairs of a pattern's key and a module
_MAX_NAMES = 2048  # names in a list; a 405B model has 882 linear layers
_MAX_INVOCATION = 1024  # tokens
_MAX_PARAMETERS = 512  # names in a list; a model of 94 layers with experts has 188

ALL_LINEAR = frozenset({"all", "all-linear"})
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_RESAVE = "Re-save the adapter with PEFT's save_pretrained"

# Options refused when truthy -> how they change the forward.
_REFUSED = {
    "use_dora": "DoRA scales the merged weight by a learned magnitude",
    "use_qalora": "QALoRA pools the inputs before A",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA cuts the base weight and puts a diagonal between A and B",
    "monteclora_config": "MonteCLoRA saves a sampler beside A and B",
    "arrow_config": "Arrow routes each token over several adapters",
    "lora_bias": "B has a bias",
    "layer_replication": "it builds a deeper model out of repeated base layers",
    "trainable_token_indices": "it replaces rows of the embedding",
}
INVOCATION = "alora_invocation_tokens"
TIES_EMBEDDINGS = "ensure_weight_tying"
TARGET_PARAMETERS = "target_parameters"
# init_lora_weights: these subtract the initial B A from the base weight.
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The validated fields of adapter_config.json that serving needs.

    Its methods take paths as stored; that of a parameter of experts as by ``parameter_at``.
    """

    rank: int
    """r, of the modules that rank_pattern does not name."""
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | None
    """As saved by PEFT; None for "all-linear" and for a regular expression, which is not read: the
    adapter's weights say which modules it matched. Empty only with ``target_parameters``."""
    modules_to_save: tuple[str, ...]
    rank_pattern: ModulePattern
    """Empty also if all its values are r; and so for alpha."""
    alpha_pattern: ModulePattern
    base_model_name: str | None
    ties_embeddings: bool = False
    """PEFT's ``ensure_weight_tying``: if the base model's embedding and output layer share their
    weight, both are adapted if one of them is named."""
    target_parameters: tuple[str, ...] = ()
    """Parameters of MoE experts, whole paths or their last components."""
    invocation: tuple[int, ...] = ()
    """Tokens from whose last occurrence in a prompt on the adapter acts (activated LoRA); empty: it
    acts on all."""
    _targets: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_targets", frozenset(self.target_modules or ()))

    @property
    def scaling(self) -> float:
        """The factor on B A x, of the modules that no pattern names."""
        return self._scaling(self.rank, self.alpha)

    @property
    def has_patterns(self) -> bool:
        """Whether modules may differ in rank or scaling."""
        return bool(self.rank_pattern or self.alpha_pattern)

    def rank_of(self, path: str) -> int:
        """The rank of a module; of a parameter of experts, of each expert."""
        return int(self.rank_pattern.value(path, self.rank))

    def scaling_of(self, path: str) -> float:
        """The factor on B A x of a module."""
        return self._scaling(self.rank_of(path), self.alpha_pattern.value(path, self.alpha))

    def _scaling(self, rank: int, alpha: float) -> float:
        """RsLoRA (arXiv 2312.03732) divides by sqrt(rank), not by rank."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether a module is targeted, by PEFT's rule: the whole path or its last components."""
        if self.target_modules is None:
            return True
        if self.ties_embeddings and path.rsplit(".", 1)[-1] in EMBEDDINGS:
            return any(target.rsplit(".", 1)[-1] in EMBEDDINGS for target in self.target_modules)
        return not self._targets.isdisjoint(endings(path))

    def parameter_at(self, path: str) -> str | None:
        """Path of the parameter whose factors are stored at the path of a module of experts; None
        if ``target_parameters`` does not say."""
        return parameter_at(path, frozenset(self.target_parameters))


def read_config(folder: AdapterFolder) -> AdapterConfig:
    """Read and validate adapter_config.json, refusing options that are not served."""
    raw = _read_json(folder, CONFIG_FILE)
    if raw is None:
        raise folder.error(
            CONFIG_FILE,
            "the file is missing",
            "Point to the folder that PEFT's save_pretrained wrote",
        )
    return parse_config(folder, raw)


def parse_config(folder: AdapterFolder, raw: Mapping[str, Any]) -> AdapterConfig:
    """Validate the content of an adapter_config.json."""
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise folder.error(CONFIG_FILE, f"it lacks {', '.join(map(repr, missing))}", _RESAVE)
    if str(raw["peft_type"]).lower() != "lora":
        raise folder.error(
            CONFIG_FILE,
            f"peft_type is {raw['peft_type']!r}, only 'LORA' is served",
            MERGE,
        )
    _refuse_options(folder, raw)
    rank, alpha = raw["r"], raw["lora_alpha"]
    if type(rank) is not int or rank <= 0:
        raise folder.error(CONFIG_FILE, f"r must be a positive integer, got {rank!r}", _RESAVE)
    if rank > _MAX_RANK:
        raise folder.error(CONFIG_FILE, f"r must be at most {_MAX_RANK}, got {rank}", _RESAVE)
    if type(alpha) not in (int, float) or alpha != alpha or alpha in (math.inf, -math.inf):
        raise folder.error(CONFIG_FILE, f"lora_alpha must be a number, got {alpha!r}", _RESAVE)
    if abs(alpha) > rank * MAX_SCALING:
        raise folder.error(
            CONFIG_FILE,
            f"lora_alpha must be at most {MAX_SCALING:g} times r, got {str(alpha)[:40]}",
            "Correct it, or scale B and lora_alpha to usual sizes and save the adapter again",
        )
    parameters = _parameters(folder, raw.get(TARGET_PARAMETERS))
    base_name = raw.get("base_model_name_or_path")
    return AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        use_rslora=bool(raw.get("use_rslora")),
        target_modules=_targets(folder, raw["target_modules"], may_be_empty=bool(parameters)),
        modules_to_save=_names(raw.get("modules_to_save"))[:_MAX_NAMES],
        rank_pattern=_pattern(folder, raw, "rank_pattern", rank),
        alpha_pattern=_pattern(folder, raw, "alpha_pattern", float(alpha)),
        base_model_name=base_name if isinstance(base_name, str) and base_name else None,
        ties_embeddings=bool(raw.get(TIES_EMBEDDINGS)),
        target_parameters=parameters,
        invocation=_invocation(folder, raw.get(INVOCATION)),
    )


def check_patterns(folder: AdapterFolder, config: AdapterConfig, modules: Iterable[str]) -> None:
    """Refuse a rank_pattern or alpha_pattern that is too long to compare with the modules, or that
    gives one of them too large a factor."""
    paths = sorted(modules)
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for option, pattern in patterns.items():
        if pattern.num_comparisons(len(paths)) > _MAX_COMPARED:
            text = f"{option} has {len(pattern)} keys, too many for {len(paths)} modules"
            raise folder.error(CONFIG_FILE, text, _RESAVE)
    if config.has_patterns:
        scalings = {path: config.scaling_of(path) for path in paths}
        folder.raise_if_any(
            [
                Problem(CONFIG_FILE, f"its patterns give {path} a factor of {scaling:g}")
                for path, scaling in scalings.items()
                if abs(scaling) > MAX_SCALING
            ],
            f"Re-save it with factors of at most {MAX_SCALING:g}",
        )


def check_added_tokens(folder: AdapterFolder, vocab_size: int | None) -> None:
    """Refuse added tokens outside the base vocabulary; those inside it repeat the tokenizer's."""
    added = _read_json(folder, ADDED_TOKENS_FILE)
    if not added or vocab_size is None:
        return
    outside = {t: i for t, i in added.items() if not isinstance(i, int) or i >= vocab_size}
    if outside:
        token, token_id = next(iter(outside.items()))
        raise folder.error(
            ADDED_TOKENS_FILE,
            f"it adds {len(outside)} tokens outside the base vocabulary of {vocab_size} "
            f"(first: {token!r} with id {token_id})",
            MERGE,
        )


def _read_json(folder: AdapterFolder, file: str) -> dict[str, Any] | None:
    """The JSON object in ``file``, or None if there is no such file."""
    try:
        most = MAX_TOKENS_BYTES if file == ADDED_TOKENS_FILE else MAX_JSON_BYTES
        content = json.loads(read_bounded(folder.path / file, most))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise folder.error(file, f"cannot read it as JSON: {error}", _RESAVE) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise folder.error(file, f"it must hold a JSON object, got a {kind}", _RESAVE)
    return content


def _refuse_options(folder: AdapterFolder, raw: Mapping[str, Any]) -> None:
    for option, effect in _REFUSED.items():
        if raw.get(option):
            raise folder.error(
                CONFIG_FILE, f"{option} is set, which is not served: {effect}", MERGE
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_ALTERS_BASE):
        raise folder.error(
            CONFIG_FILE,
            f"init_lora_weights is {init!r}: that training changed the base weights, so on the "
            "original base model the adapter's output would be wrong",
            "Convert it (peft: save_pretrained with path_initial_model_for_weight_conversion), "
            'or serve the changed base model and set "init_lora_weights": true',
        )


def _parameters(folder: AdapterFolder, targets: Any) -> tuple[str, ...]:
    if not targets:
        return ()
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        text = f"{TARGET_PARAMETERS} must be a list of names, got {targets!r}"
        raise folder.error(CONFIG_FILE, text, _RESAVE)
    if len(targets) > _MAX_PARAMETERS:
        text = f"{TARGET_PARAMETERS} has {len(targets)} names, of at most {_MAX_PARAMETERS}"
        raise folder.error(CONFIG_FILE, text, _RESAVE)
    other = [target for target in targets if target.rsplit(".", 1)[-1] not in PARAMETERS]
    if other:
        raise folder.error(
            CONFIG_FILE,
            f"{TARGET_PARAMETERS} is set to {other[0]!r}, which is not served: LoRA on bare "
            "parameters other than gate_up_proj and down_proj of MoE experts, such as a router's",
            MERGE,
        )
    return tuple(targets)


def _invocation(folder: AdapterFolder, tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    is_list = isinstance(tokens, list) and 0 < len(tokens) <= _MAX_INVOCATION
    if not is_list or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise folder.error(
            CONFIG_FILE,
            f"{INVOCATION} must be a list of 1 to {_MAX_INVOCATION} token ids, got {tokens!r:.80}",
            _RESAVE,
        )
    return tuple(tokens)


def _targets(folder: AdapterFolder, targets: Any, *, may_be_empty: bool) -> tuple[str, ...] | None:
    if may_be_empty and not targets:
        return ()
    if isinstance(targets, str):
        if not targets:
            raise folder.error(CONFIG_FILE, "target_modules is empty", _RESAVE)
        return None
    if not isinstance(targets, list) or not all(isinstance(t, str) and t for t in targets):
        raise folder.error(
            CONFIG_FILE, f"target_modules must be a list of names, got {targets!r}", _RESAVE
        )
    if len(targets) > _MAX_NAMES:
        text = f"target_modules has {len(targets)} names, of at most {_MAX_NAMES}"
        raise folder.error(CONFIG_FILE, text, _RESAVE)
    if not targets:
        raise folder.error(CONFIG_FILE, "target_modules is empty", _RESAVE)
    return tuple(targets)


def _pattern(
    folder: AdapterFolder, raw: Mapping[str, Any], option: str, default: float
) -> ModulePattern:
    pattern = raw.get(option) or {}
    try:
        found = ModulePattern({key: float(value) for key, value in dict(pattern).items()})
    except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise folder.error(
            CONFIG_FILE, f"{option} must map module patterns to numbers: {error}", _RESAVE
        ) from error
    if option == "rank_pattern":
        wrong = [v for v in found.values() if not (v == int(v) and 0 < v <= _MAX_RANK)]
    else:
        wrong = [v for v in found.values() if not math.isfinite(v)]
    if wrong:
        raise folder.error(CONFIG_FILE, f"{option} has the value {wrong[0]:g}", _RESAVE)
    return found if any(value != default for value in found.values()) else ModulePattern({})


def _names(value: Any) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()
