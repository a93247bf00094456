"""The error for an adapter that cannot be served; joins several problems into one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MERGE = (
    "Merge it into the base model (peft: merge_and_unload, then save_pretrained) "
    "and serve the result as its own model"
)

SHOWN = 3
"""Number of problems quoted in an error; further ones are only counted."""

_MAX_PROBLEM_CHARS = 500
_MAX_REASON_CHARS = 2000
_MAX_WHERE_CHARS = 4500  # longer than the longest Linux path (4096) and a file name in it


class AdapterError(ValueError):
    """An adapter that cannot be served because of its files, not because of a server error.

    Text: ``LoRA adapter 'NAME' (PATH/FILE): REASON. REMEDY.`` Reasons quote untrusted text and go
    into logs and terminals: unprintable characters are escaped, long texts are cut.
    """

    def __init__(self, name: str, where: str, reason: str, remedy: str) -> None:
        self.name = name
        self.where = _shown(where, _MAX_WHERE_CHARS)
        self.reason = _shown(reason, _MAX_REASON_CHARS)
        self.remedy = _shown(remedy, _MAX_REASON_CHARS)
        super().__init__(name, self.where, self.reason, self.remedy)  # so that it pickles

    def __str__(self) -> str:
        text = f"{_closed(self.reason)} {_closed(self.remedy)}"
        return f"LoRA adapter {self.name!r} ({self.where}): {text}"


def _shown(text: str, most: int) -> str:
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def _closed(sentence: str) -> str:
    return sentence.rstrip(". ") + "."


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with one tensor or key of ``file``."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter's local folder and served name; builds the errors about this adapter."""

    name: str
    path: Path

    def error(self, file: str, reason: str, remedy: str) -> AdapterError:
        return AdapterError(self.name, str(self.path / file), reason, remedy)

    def raise_if_any(self, problems: Sequence[Problem], remedy: str) -> None:
        """Raise one error that shows the first problems and counts the rest."""
        if not problems:
            return
        reason = "; ".join(_shown(p.reason, _MAX_PROBLEM_CHARS) for p in problems[:SHOWN])
        if len(problems) > SHOWN:
            reason += f"; and {len(problems) - SHOWN} more like this"
        raise self.error(problems[0].file, reason, remedy)
