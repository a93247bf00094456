"""The one error for an adapter that cannot be served, and how several reasons become one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MERGE = (
    "Merge it into the base model (peft: merge_and_unload, then save_pretrained) "
    "and serve the result as its own model"
)

_SHOWN = 3


class AdapterError(ValueError):
    """An adapter that cannot be served: a mistake of the user's, not of ours.

    Text: ``LoRA adapter 'NAME' (PATH/FILE): REASON. REMEDY.``
    """

    def __init__(self, name: str, where: str, reason: str, remedy: str) -> None:
        super().__init__(name, where, reason, remedy)  # args in full, so that it pickles
        self.name = name
        self.where = where
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{_closed(self.reason)} {_closed(self.remedy)}"
        return f"LoRA adapter {self.name!r} ({self.where}): {text}"


def _closed(sentence: str) -> str:
    return sentence.rstrip(". ") + "."


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one tensor or key of ``file``."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A local folder and the name it is served under; it builds the errors about itself."""

    name: str
    path: Path

    def error(self, file: str, reason: str, remedy: str) -> AdapterError:
        return AdapterError(self.name, str(self.path / file), reason, remedy)

    def raise_if_any(self, problems: Sequence[Problem], remedy: str) -> None:
        """Raise one error that shows the first problems and counts the rest."""
        if not problems:
            return
        reason = "; ".join(problem.reason for problem in problems[:_SHOWN])
        if len(problems) > _SHOWN:
            reason += f"; and {len(problems) - _SHOWN} more like this"
        raise self.error(problems[0].file, reason, remedy)
