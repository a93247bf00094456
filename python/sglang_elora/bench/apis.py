"""The three ways to ask: SGLang's ``/generate``, and the two of the OpenAI API that complete text.

A conversation is one session over one API: it makes the body of the next request out of what was
said before, and reads the events that come back. The OpenAI API takes text, so a trace's token is a
word there; lengths in tokens are then what the server counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_elora.testbed.corpus import ADJECTIVES, NOUNS, VERBS
from sglang_elora.workloads import Session, Turn

WORDS = (*NOUNS, *VERBS, *ADJECTIVES)


@dataclass(slots=True)
class Answer:
    """What the events of one answer have said so far; set by its conversation."""

    output: tuple[int, ...] = ()
    num_answered: int | None = None
    text: str = ""
    num_prompt: int = 0
    num_cached: int = 0
    num_from_host: int = 0
    reason: str | None = None
    error: str | None = None

    @property
    def num_output(self) -> int:
        return len(self.output) if self.num_answered is None else self.num_answered


class Conversation(Protocol):
    """One session. Calls come in turns: ``ask``, ``read`` per event, ``said`` if all went well."""

    path: str

    def ask(self, turn: Turn) -> dict[str, Any]:
        """The body of the request of the session's next turn."""

    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        """Take an event into the answer; whether it brought tokens."""

    def said(self, answer: Answer) -> None:
        """The answer is part of what the next turn begins with."""


Open = Callable[[Session], Conversation]
"""Begins a session."""


@dataclass(slots=True)
class Native:
    """Prompts as ids: what is sent, and what is cached, is exact."""

    session: Session
    path: str = "/generate"
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history += self.session.system

    def ask(self, turn: Turn) -> dict[str, Any]:
        self.history += turn.new_tokens
        return {
            "input_ids": self.history,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": turn.num_output,
                "ignore_eos": True,
            },
            "lora_path": self.session.adapter or None,
            "stream": True,
        }

    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        if "error" in event:
            answer.error = str(event["error"])
            return False
        meta = event["meta_info"]
        answer.output = tuple(event["output_ids"])
        answer.num_prompt = len(self.history)
        answer.num_cached = meta["cached_tokens"]
        answer.num_from_host = (meta.get("cached_tokens_details") or {}).get("host", 0)
        answer.reason = (meta.get("finish_reason") or {}).get("type")
        return True

    def said(self, answer: Answer) -> None:
        self.history += answer.output


@dataclass(slots=True)
class Completions:
    """One growing text."""

    session: Session
    model: str
    path: str = "/v1/completions"
    history: str = ""

    def __post_init__(self) -> None:
        self.history = words(self.session.system)

    def ask(self, turn: Turn) -> dict[str, Any]:
        self.history = f"{self.history} {words(turn.new_tokens)}".lstrip()
        return {"prompt": self.history, **_options(self.model, turn)}

    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        return _read(event, answer, lambda choice: choice.get("text"))

    def said(self, answer: Answer) -> None:
        self.history += answer.text


@dataclass(slots=True)
class ChatCompletions:
    """Messages, which the server puts together with the model's chat template."""

    session: Session
    model: str
    path: str = "/v1/chat/completions"
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.session.system:
            self.messages.append({"role": "system", "content": words(self.session.system)})

    def ask(self, turn: Turn) -> dict[str, Any]:
        self.messages.append({"role": "user", "content": words(turn.new_tokens)})
        return {"messages": self.messages, **_options(self.model, turn)}

    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        return _read(event, answer, lambda choice: choice["delta"].get("content"))

    def said(self, answer: Answer) -> None:
        self.messages.append({"role": "assistant", "content": answer.text})


def words(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token % len(WORDS)] for token in tokens)


def _options(model: str, turn: Turn) -> dict[str, Any]:
    """``ignore_eos`` is an extension that SGLang and vLLM share: answers as long as asked for."""
    return {
        "model": model,
        "temperature": 0,
        "max_tokens": turn.num_output,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read(
    event: Mapping[str, Any], answer: Answer, text_of: Callable[[Mapping[str, Any]], str | None]
) -> bool:
    if "error" in event:
        answer.error = str(event["error"])
        return False
    if usage := event.get("usage"):
        answer.num_prompt = usage["prompt_tokens"]
        answer.num_answered = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        answer.num_cached = details.get("cached_tokens") or 0
    text = ""
    for choice in event.get("choices", ()):
        text += text_of(choice) or ""
        answer.reason = choice.get("finish_reason") or answer.reason
    answer.text += text
    return bool(text)
