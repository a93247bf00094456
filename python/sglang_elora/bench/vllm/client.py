"""Client of vLLM's ``/v1/completions`` with token ids: exact lengths, as SGLang's ``/generate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from sglang_elora.bench.apis import Answer, Native
from sglang_elora.workloads import Turn

MODEL = "demo"  # the served name of the base model


@dataclass(slots=True)
class TokenCompletions(Native):
    """A session over ``/v1/completions``; the adapter is the request's model."""

    path: str = "/v1/completions"

    @override
    def ask(self, turn: Turn) -> dict[str, Any]:
        self.history += turn.new_tokens
        return {
            "model": self.session.adapter or MODEL,
            "prompt": self.history,
            "temperature": 0,
            "max_tokens": turn.num_output,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    @override
    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        if "error" in event:
            answer.error = str(event["error"])
            return False
        if usage := event.get("usage"):
            answer.num_prompt = usage["prompt_tokens"]
            answer.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        tokens: tuple[int, ...] = ()
        for choice in event.get("choices", ()):
            tokens += tuple(choice.get("token_ids") or ())
            answer.reason = choice.get("finish_reason") or answer.reason
        answer.output += tokens
        return bool(tokens)
