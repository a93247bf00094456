"""Clients of three APIs: SGLang's ``/generate``, and the OpenAI API's completions and chat.

A conversation is one session over one API: it builds the body of the next request from the history,
and parses the streamed events. The OpenAI API takes text, so each token of a trace is sent as a
word; token counts are then the server's.
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
    """State of one answer, accumulated from its events by its conversation."""

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
    """One session. Per turn: ``ask`` once, ``read`` per event, ``said`` if the turn succeeded."""

    path: str

    def ask(self, turn: Turn) -> dict[str, Any]:
        """The request body of the session's next turn."""

    def read(self, event: Mapping[str, Any], answer: Answer) -> bool:
        """Add an event to the answer; returns whether it contained tokens."""

    def said(self, answer: Answer) -> None:
        """Append the answer to the history of the next turn."""


Open = Callable[[Session], Conversation]
"""Function that starts the conversation of a session."""


@dataclass(slots=True)
class Native:
    """``/generate`` with token ids, so that prompt and cached lengths are exact."""

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
    """``/v1/completions``, with the history as one text."""

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
    """``/v1/chat/completions``; the server applies the model's chat template to the messages."""

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
    """Common request options. ``ignore_eos`` (SGLang and vLLM) makes answers of the full length."""
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
