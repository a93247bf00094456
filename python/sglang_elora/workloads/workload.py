"""Description of a trace: parameters of the generator, or the source of a recorded trace."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_elora.workloads.popularity import Law

NOMINAL_ANSWER_S = 0.5  # assumed duration of an answer, only to estimate when turns are due
GROWS_AT = 2 / 3  # share of the duration after which the second value of ``active`` applies


@dataclass(frozen=True, slots=True)
class Workload:
    """Parameters of generated sessions.

    Lengths are lognormal (``*_spread``: standard deviation of the logarithm), thinking times Gamma
    of shape ``think_shape``, gaps between session starts Gamma with coefficient of variation
    ``start_cv``. Only the ``active`` share of the adapters is used (before and after ``GROWS_AT``),
    and the popularity ranking shifts by one adapter ``moves`` times per trace.

    With ``num_checks``, each conversation belongs to an application with that many adapters of its
    own. It is held with the base model, and after each turn these adapters are asked about it.
    """

    name: str
    system_tokens: tuple[int, int]  # shortest and longest, uniform over adapters
    user_tokens: float  # mean
    output_tokens: float  # mean before clipping to output_limits
    turns: tuple[int, int]  # uniform
    think_s: float  # mean
    moves: int
    law: Law = Law.ZIPF
    skew: float = 1.0
    active: tuple[float, float] = (1.0, 1.0)
    num_adapters: int = 64
    user_spread: float = 0.6
    output_spread: float = 0.5
    output_limits: tuple[int, int] = (8, 32)
    think_shape: float = 2.0
    start_cv: float = 1.5
    max_tokens: int = 2048  # of a session, prompts and answers together
    vocab_size: int = 2048
    num_checks: int = 0
    check_tokens: float = 30.0  # mean of a question
    check_output: int = 8  # of each answer

    @property
    def mean_turns(self) -> float:
        return sum(self.turns) / 2

    @property
    def mean_life_s(self) -> float:
        """Mean seconds from a session's first turn to the end of its last."""
        return self.mean_turns * (self.think_s + NOMINAL_ANSWER_S)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Source of a recorded trace: format, file, and options of its completion."""

    name: str
    path: str
    options: str = ""
