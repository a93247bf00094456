"""Random LoRA adapters of mixed rank and coverage, written with ``peft`` itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
from sglang_elora.testbed.build_once import MANIFEST_NAME, build_once

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

QUERY_VALUE: tuple[Module, ...] = ("q_proj", "v_proj")
ATTENTION: tuple[Module, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: tuple[Module, ...] = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR: tuple[Module, ...] = (*ATTENTION, *MLP)
COVERAGE_NAMES: Mapping[tuple[Module, ...], str] = {
    QUERY_VALUE: "q, v",
    ATTENTION: "attention",
    MLP: "MLP",
    ALL_LINEAR: "all linear",
}

_FORMAT = 1  # increment when the same spec yields different bytes
_STRENGTH = 0.6  # std of the adapter's output for unit-variance input; the base's is 1 to 2
_RANKS = (8, 16, 24, 32, 48, 64)
_NAMES = [
    "law",
    "travel",
    "cooking",
    "banking",
    "health",
    "music",
    "school",
    "weather",
    "sports",
    "garden",
    "history",
    "physics",
    "support",
    "poetry",
    "chess",
    "cinema",
]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """All parameters of a random adapter; with the base's shapes they determine every bit of it."""

    name: str
    rank: int
    alpha: int
    target_modules: tuple[Module, ...]
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(
                f"adapter {self.name!r}: rank={self.rank} and alpha={self.alpha} must be positive"
            )
        unknown = set(self.target_modules) - set(get_args(Module))
        if unknown or not self.target_modules:
            raise ValueError(
                f"adapter {self.name!r}: target_modules={self.target_modules} must name at least "
                f"one of {get_args(Module)} and nothing else"
            )

    @property
    def scaling(self) -> float:
        """Factor on ``B @ A @ x``: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def coverage(self) -> str:
        """Short name of the target modules, for tables."""
        return COVERAGE_NAMES.get(self.target_modules) or ", ".join(self.target_modules)


def demo_adapters(count: int = 16) -> list[AdapterSpec]:
    """``count`` adapters over six ranks (8 to 64), four coverages, alpha equal to rank or not."""
    coverages = tuple(COVERAGE_NAMES)
    specs = []
    for i in range(count):
        rank = _RANKS[i % len(_RANKS)]
        round_trip, position = divmod(i, len(_NAMES))
        specs.append(
            AdapterSpec(
                name=_NAMES[position] + (f"-{round_trip + 1}" if round_trip else ""),
                rank=rank,
                alpha=(rank, 2 * rank, 16)[i % 3],
                # i // 4 is added so that rank and coverage do not cycle together.
                target_modules=coverages[(i + i // 4) % len(coverages)],
                seed=i,
            )
        )
    return specs


def make_adapters(base: Path, directory: Path, specs: Sequence[AdapterSpec]) -> dict[str, Path]:
    """Write each missing adapter to ``directory/<name>``; return all paths by name.

    An adapter's tensors depend only on its spec and on the shapes of the checkpoint ``base``.

    Raises:
        ValueError: Two specs share a name, or a target directory has other content.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"adapter names must be distinct, got {names}")
    factory = _Factory(base)
    return {spec.name: factory.make(spec, directory / spec.name) for spec in specs}


class _Factory:
    """Writes adapters for one checkpoint, which is loaded only if an adapter is missing."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._model: PreTrainedModel | None = None

    def make(self, spec: AdapterSpec, directory: Path) -> Path:
        parameters = {
            "kind": "adapter",
            "format": _FORMAT,
            "spec": asdict(spec),
            "base": json.loads((self._base / MANIFEST_NAME).read_text()),
        }

        def build(draft: Path) -> None:
            self._write(spec, draft)

        return build_once(directory, parameters, build)

    def _write(self, spec: AdapterSpec, directory: Path) -> None:
        ensure_torchvision_importable()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self._base)
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.target_modules),
            use_rslora=spec.use_rslora,
            bias="none",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(self._model, config)
        _randomise(adapted, spec)
        adapted.save_pretrained(str(directory), safe_serialization=True)
        self._model = cast("PreTrainedModel", adapted.unload())
        _sort_target_modules(directory / "adapter_config.json")


def copy_activated(adapter: Path, folder: Path, invocation: Sequence[int]) -> Path:
    """Copy an adapter to ``folder`` as an activated LoRA, and return the folder.

    Args:
        invocation: Tokens from whose last occurrence in a prompt on the copy acts.
    """
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"alora_invocation_tokens": list(invocation)}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def _randomise(adapted: PeftModel, spec: AdapterSpec) -> None:
    """Fill A and B in place so that scaling * B A x has std ``_STRENGTH`` for unit-variance x.

    ``lora_A``: [rank, in_features], ``lora_B``: [out_features, rank]. Each tensor has its
    own generator, seeded by spec and name.
    """
    import torch

    from sglang_elora.testbed.noise import noise

    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" not in name:
                continue
            std = weight.shape[1] ** -0.5
            if "lora_B" in name:
                std *= _STRENGTH / spec.scaling
            weight.copy_(noise(f"{spec}/{name}", weight.shape) * std)


def _sort_target_modules(config_path: Path) -> None:
    """Sort the names for reproducible files: peft writes them from a set, in hash order."""
    config = json.loads(config_path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
