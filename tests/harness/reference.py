"""What transformers and PEFT generate: the truth that a server's outputs must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()

import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


class Reference:
    """Greedy generation in float32, one prompt at a time, without any cache between prompts."""

    def __init__(
        self,
        checkpoint: Path,
        adapters: Mapping[str, Path],
        auto: str = "AutoModelForCausalLM",
    ) -> None:
        self._checkpoint, self._auto = checkpoint, auto
        self._adapters = adapters
        self._alone: dict[str, Any] = {}  # models of one adapter
        self._answers: dict[tuple[str | None, tuple[int, ...], int], list[int]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._checkpoint)

    @cached_property
    def _shared(self) -> Any:
        """The base with all adapters that PEFT 0.21 loads into one model."""
        return self._with(
            {name: path for name, path in self._adapters.items() if not _needs_its_own_model(path)}
        )

    def _with(self, adapters: Mapping[str, Path]) -> Any:
        base = getattr(transformers, self._auto).from_pretrained(
            self._checkpoint, dtype=torch.float32
        )
        base.generation_config.eos_token_id = None  # the servers ignore it, too
        first, *others = adapters.items()
        model = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
        for name, path in others:
            model.load_adapter(path, adapter_name=name)
        return model.eval()

    def generate(
        self, adapter: str | None, prompt: Sequence[int], num_tokens: int = 32
    ) -> list[int]:
        """The ``num_tokens`` greedy tokens after ``prompt``; ``adapter`` None is the base."""
        key = (adapter, tuple(prompt), num_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(*key)
        return self._answers[key]

    def text(self, adapter: str | None, prompt: Sequence[int], num_tokens: int = 32) -> str:
        answer: str = self.tokenizer.decode(
            self.generate(adapter, prompt, num_tokens), skip_special_tokens=True
        )
        return answer

    def logprobs(self, adapter: str | None, ids: Sequence[int]) -> list[float]:
        """Log-probability of each of the tokens but the first."""
        tokens = torch.tensor([list(ids)])
        with torch.inference_mode():
            logits = self._with_adapter(adapter, lambda model: model(tokens).logits[0, :-1])
        chosen: torch.Tensor = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])
        return [float(value) for value in chosen[:, 0]]

    def embedding(self, adapter: str | None, prompt: Sequence[int]) -> torch.Tensor:
        """The last token's hidden state after the final norm, of length 1: float32 ``[hidden]``."""
        tokens = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = self._with_adapter(
                adapter, lambda model: model(tokens, output_hidden_states=True)
            )
        last: torch.Tensor = output.hidden_states[-1][0, -1]
        return last / last.norm()

    def shortfall(self, adapter: str | None, prompt: Sequence[int], output: Sequence[int]) -> float:
        """How far the logit of a token of the output lies below the highest one, at most: 0 where
        it is what ``generate`` gives, and very little where rounding decides between two."""
        tokens = torch.tensor([[*prompt, *output]])
        with torch.inference_mode():
            logits = self._with_adapter(adapter, lambda model: model(tokens).logits[0, :-1])
        logits = logits[len(prompt) - 1 :]
        chosen: torch.Tensor = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        return float((logits.amax(-1) - chosen).max())

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def _generate(self, adapter: str | None, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        options = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "max_new_tokens": num_tokens,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            output = self._with_adapter(adapter, lambda model: model.generate(ids, **options))
        generated: list[int] = output[0, ids.shape[1] :].tolist()
        return generated

    def _with_adapter(self, adapter: str | None, work: Callable[[Any], Any]) -> Any:
        if adapter is None:
            with self._shared.disable_adapter():
                return work(self._shared)
        path, model = self._adapters[adapter], self._shared
        if _needs_its_own_model(path):
            if adapter not in self._alone:
                self._alone[adapter] = self._with({adapter: path})
            model = self._alone[adapter]
        model.set_adapter(adapter)
        return work(model)


def _needs_its_own_model(adapter: Path) -> bool:
    """Whether the adapter ties embeddings, whose output layer PEFT does not load into a model with
    other adapters, or has weights for experts, which must be the same ones in all adapters."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        has_experts = any(".experts." in name for name in tensors.keys())  # noqa: SIM118
    return bool(config.get("ensure_weight_tying")) or has_experts
