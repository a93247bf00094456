"""Serves a request with the adapter that its ``model`` names, on every endpoint, or refuses it.

SGLang supports ``base-model:adapter`` on some of its OpenAI endpoints only; on the others the base
model answers. The base model also answers for an adapter's name alone, the id in ``/v1/models``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

_named: ContextVar[str | list[str | None] | None] = ContextVar("named_adapter", default=None)
"""The adapter that the current HTTP request names; each request is served by a separate task."""


def parse_model(
    original: Callable[..., tuple[str, str | None]], self: OpenAIServingBase, model: str
) -> tuple[str, str | None]:
    """Parse ``model`` as an id listed by ``/v1/models`` first, even with a colon in it. Runs around
    ``OpenAIServingBase._parse_model_parameter``."""
    manager = self.tokenizer_manager
    if model == manager.served_model_name:
        return model, None
    if model in manager.lora_registry._registry:  # ``get_all_adapters`` copies the whole table
        return manager.served_model_name, model
    return original(self, model)


def adapter_of(serving: OpenAIServingBase, request: Any) -> str | list[str | None] | None:
    """The adapter that a request to an OpenAI endpoint names, or a list with one per prompt."""
    model, explicit = getattr(request, "model", None), getattr(request, "lora_path", None)
    named: str | list[str | None] | None = serving._resolve_lora_path(model or "", explicit)
    return named


def note_named(self: OpenAIServingBase, request: Any, *rest: Any) -> None:
    """Store the adapter that a request names. Runs before the handler of an OpenAI endpoint."""
    _named.set(adapter_of(self, request))


def use_named(result: None, self: GenerateReqInput | EmbeddingReqInput) -> None:
    """Set the stored adapter on a request that an endpoint created without it. Runs after
    ``normalize_batch_and_arguments``.

    Raises:
        ValueError: A list of adapters was named, but the endpoint created another number of
            prompts.
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
