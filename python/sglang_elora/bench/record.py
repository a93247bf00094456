"""What happened to each request, and to the pool meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds since the start of the trace."""

    session: int
    turn: int
    adapter: str  # empty for the base model
    due_s: float
    sent_s: float
    first_s: float | None  # first token
    last_s: float | None  # last token
    num_prompt: int
    num_cached: int  # of the prompt, from any tier
    num_from_host: int  # of those
    output: tuple[int, ...]  # empty where the API gives no ids
    error: str | None = None
    num_answered: int | None = None  # tokens, where it gives none

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        return cls(**{**row, "output": tuple(row["output"])})

    @property
    def key(self) -> tuple[int, int]:
        return self.session, self.turn

    @property
    def num_output(self) -> int:
        return len(self.output) if self.num_answered is None else self.num_answered

    @property
    def ttft_s(self) -> float | None:
        """From the moment at which it was due, so that a late client does not flatter."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.last_s is None or self.num_output < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output - 1)


@dataclass(frozen=True, slots=True)
class PoolSample:
    """What the device held at a moment, as far as the server says it.

    ``uses`` are slots of the pool by what they hold (ELORA), or tokens that requests hold
    (stock: ``running`` alone). ``kv`` and ``invalid_kv`` are cached tokens, and those whose adapter
    is not there; None where nobody says.
    """

    at_s: float
    slots: int
    uses: Mapping[str, int]
    kv: int | None
    invalid_kv: int | None
    num_waiting: int
    num_running: int


@dataclass(frozen=True, slots=True)
class Played:
    """``before`` and ``after`` are ELORA's own counts, None on a stock server."""

    records: tuple[Record, ...]
    wall_s: float
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    pool: tuple[PoolSample, ...] = ()
