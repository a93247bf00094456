"""Running sessions and their requests, with the records of ended requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_elora.sim.segment import Segment
from sglang_elora.workloads import Session


@dataclass(slots=True, eq=False)
class Talk:
    """A running session, or a check of it. ``path`` is the prefix of its next prompt: the system
    prompt and one segment per turn."""

    session: Session
    adapter: Segment
    path: list[Segment]
    num_tokens: int  # of the history, including the last answer's last token
    is_check: bool = False
    copies: dict[str, list[Segment]] = field(default_factory=dict)
    """The history as KV of adapters that have checked it, without their questions and answers."""

    @property
    def name(self) -> str:
        """The ``session_id`` of its requests."""
        return f"session-{self.session.number}"


@dataclass(slots=True, eq=False)
class Request:
    """One request. It has ``num_reserved`` slots outside the tree: for the tokens that it computes
    and for its answer."""

    talk: Talk
    turn: int
    due_s: float
    num_prompt: int
    num_output: int
    num_cached: int = 0
    num_from_host: int = 0
    num_reserved: int = 0
    locked: list[Segment] = field(default_factory=list)
    missing: list[Segment] = field(default_factory=list)  # segments of the path to compute
    was_cold: bool = False  # its adapter was not on the device at its arrival
    first_s: float = 0.0

    @property
    def lora_id(self) -> str | None:
        """The request's adapter; SGLang's name of the field."""
        return self.talk.adapter.adapter.adapter_id

    @property
    def origin_input_ids(self) -> range:
        """A range as long as the prompt; SGLang's name of the field."""
        return range(self.num_prompt)


@dataclass(frozen=True, slots=True)
class Record:
    """Outcome of one request; times are seconds since the start of the trace."""

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
    is_check: bool = False

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s
