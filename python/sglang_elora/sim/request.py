"""Sessions as they go on, and one request of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_elora.sim.segment import Segment
from sglang_elora.workloads import Session


@dataclass(slots=True, eq=False)
class Talk:
    """``path`` is what the next prompt begins with: the system prompt and one segment per turn."""

    session: Session
    adapter: Segment
    path: list[Segment]
    num_tokens: int  # of the history, the last answer's last token included

    @property
    def name(self) -> str:
        """``session_id`` of its requests."""
        return f"session-{self.session.number}"


@dataclass(slots=True, eq=False)
class Request:
    """``num_reserved`` slots are its own: of what it computes, and of its answer."""

    talk: Talk
    turn: int
    due_s: float
    num_prompt: int
    num_output: int
    num_cached: int = 0
    num_from_host: int = 0
    num_reserved: int = 0
    locked: list[Segment] = field(default_factory=list)
    missing: list[Segment] = field(default_factory=list)  # of the path, to be computed again
    was_cold: bool = False  # its adapter was not there when it came
    first_s: float = 0.0

    @property
    def lora_id(self) -> str:
        """Its adapter, by SGLang's name for it."""
        return self.talk.session.adapter

    @property
    def origin_input_ids(self) -> range:
        """Stands for the tokens of its prompt, by SGLang's name for them."""
        return range(self.num_prompt)


@dataclass(frozen=True, slots=True)
class Record:
    """What happened to a request; seconds since the start of the trace."""

    session: int
    turn: int
    due_s: float
    first_s: float
    last_s: float
    num_prompt: int
    num_cached: int  # from any tier
    num_from_host: int
    num_output: int
    was_cold: bool

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s
