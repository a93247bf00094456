"""Records of the turns of a chat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """Measurements of one answered turn; times are seconds since its request was sent."""

    session: int
    adapter: str
    turn: int
    sent_s: float  # since the start of the chats
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TurnFailure:
    """A turn without a complete answer; it ends its session."""

    session: int
    adapter: str
    turn: int
    error: str


TurnResult = TurnRecord | TurnFailure
