"""What is recorded of each turn of a chat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What one answered turn took; its times are seconds since its request was sent."""

    session: int
    adapter: str
    turn: int
    sent_s: float  # since the chats began
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TurnFailure:
    """A turn that got no answer, which ends its session."""

    session: int
    adapter: str
    turn: int
    error: str


TurnResult = TurnRecord | TurnFailure
