"""Completion of recorded traces with adapters and token ids, which their files lack."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sglang_elora.workloads.generate import adapter_name, in_order
from sglang_elora.workloads.popularity import Law, draw
from sglang_elora.workloads.trace import Session, Trace, due_s
from sglang_elora.workloads.workload import Recorded


@dataclass(frozen=True, slots=True)
class Assignment:
    """Rule that assigns adapters to the sessions of a file without any; ``vocab_size`` bounds the
    drawn token ids."""

    num_adapters: int = 64
    law: Law = Law.ZIPF
    skew: float = 1.0
    seed: int = 0
    vocab_size: int = 2048

    def adapter(self, number: int) -> str:
        """The adapter of session ``number``."""
        rng = random.Random(f"adapter/{self.seed}/{number}")
        return adapter_name(draw(self.law, self.skew, self.num_adapters, number, rng))

    def trace(self, name: str, path: Path, sessions: Iterable[Session]) -> Trace:
        """A trace of the sessions of a file, in order of their starts.

        Raises:
            ValueError: There are no sessions.
        """
        ordered = in_order(sessions)
        if not ordered:
            raise ValueError(f"{path}: no requests in it")
        end_s = max(due_s(session)[-1] for session in ordered) + 1.0
        options = f"adapters={self.num_adapters} law={self.law.value} skew={self.skew}"
        num_turns = sum(len(session.turns) for session in ordered)
        about = Recorded(name, str(path), options)
        return Trace(about, self.seed, num_turns / end_s, end_s, ordered)


DEFAULT = Assignment()


def bad_row(path: Path, line: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {line}: {what}")
