"""Records of requests, and samples of the pool, of a replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """Outcome of one request. Times are seconds since the start of the trace."""

    session: int
    turn: int
    adapter: str  # empty for the base model
    due_s: float
    sent_s: float
    first_s: float | None  # first token
    last_s: float | None  # last token
    num_prompt: int
    num_cached: int  # prompt tokens from any tier
    num_from_host: int  # those of ``num_cached`` from the host
    output: tuple[int, ...]  # token ids; empty if the API has none
    error: str | None = None
    num_answered: int | None = None  # output tokens, if the API has no ids

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
        """Seconds from due time to first token, so that a late client does not improve it."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.last_s is None or self.num_output < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output - 1)

    @property
    def e2e_s(self) -> float | None:
        """Seconds from due time to last token."""
        return None if self.last_s is None else self.last_s - self.due_s


@dataclass(frozen=True, slots=True)
class PoolSample:
    """Content of the device at one time, as reported by the server.

    ``uses`` are slots of the pool by content (ELORA), or tokens of running requests
    (stock: only ``running``). ``kv`` and ``invalid_kv`` are cached tokens, and those whose adapter
    is not on the device; None if the server does not report them.
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
    """Result of a replay. ``before`` and ``after`` are ELORA's counters, None on a stock server."""

    records: tuple[Record, ...]
    wall_s: float
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    pool: tuple[PoolSample, ...] = ()
