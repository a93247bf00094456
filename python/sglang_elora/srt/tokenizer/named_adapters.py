"""A request whose ``model`` names an adapter is served by it, on every endpoint, or refused.

SGLang reads ``base-model:adapter`` on some of its OpenAI endpoints; on the others the base model
answers. It also does for the adapter's name alone, which is the id that ``/v1/models`` lists.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

_named: ContextVar[str | list[str | None] | None] = ContextVar("named_adapter", default=None)
"""What the HTTP request that this task serves names; each is served by a task of its own."""


def parse_model(
    original: Callable[..., tuple[str, str | None]], self: OpenAIServingBase, model: str
) -> tuple[str, str | None]:
    """Around ``OpenAIServingBase._parse_model_parameter``: an id that ``/v1/models`` lists is what
    it says, also one with a colon in it."""
    manager = self.tokenizer_manager
    if model == manager.served_model_name:
        return model, None
    if model in manager.lora_registry._registry:  # ``get_all_adapters`` copies the whole table
        return manager.served_model_name, model
    return original(self, model)


def adapter_of(serving: OpenAIServingBase, request: Any) -> str | list[str | None] | None:
    """The adapter that a request to an OpenAI endpoint names, or one for each of its prompts."""
    model, explicit = getattr(request, "model", None), getattr(request, "lora_path", None)
    named: str | list[str | None] | None = serving._resolve_lora_path(model or "", explicit)
    return named


def note_named(self: OpenAIServingBase, request: Any, *rest: Any) -> None:
    """Before what serves one HTTP request of an OpenAI endpoint."""
    _named.set(adapter_of(self, request))


def use_named(result: None, self: GenerateReqInput | EmbeddingReqInput) -> None:
    """After ``normalize_batch_and_arguments`` of a request that an endpoint made without the
    adapter that its own request names.

    Raises:
        ValueError: One adapter for each prompt was named, where the endpoint made other prompts.
    """
    named = _named.get()
    if named is None or self.lora_path is not None:
        return
    if self.is_single and isinstance(named, list):
        raise ValueError("lora_path must be one name here")
    num_prompts = self.batch_size * getattr(self, "parallel_sample_num", 1)
    if isinstance(named, list) and len(named) != num_prompts:
        raise ValueError(f"lora_path has {len(named)} names for {num_prompts} prompts")
    self.lora_path = named if self.is_single or isinstance(named, list) else [named] * num_prompts
