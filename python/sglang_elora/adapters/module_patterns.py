"""PEFT's rank_pattern and alpha_pattern: numbers by patterns of module paths.

A pattern is a regular expression that a stranger wrote. Only expressions whose match takes little
time are accepted: a failing match tries every way to match, and one repetition of a character or
class takes the square of the path's length, each alternative doubles that, and several repetitions,
or a repeated group, may take exponential time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, ValuesView

MAX_KEYS = 2048
"""Keys of a pattern; a 405B model has 882 linear layers."""

_MAX_CHARS = 512
_MAX_ALTERNATIVES = 4
_MAX_BRANCHING = 32  # expressions with repetitions or alternatives in one pattern
_EXPRESSION_COST = 32  # an expression's comparison takes as long as that many of plain names
_PLAIN = re.compile(r"[\w.-]+")  # names: the part after the last dot matches only itself
_REPETITION = re.compile(r"[*+?{]")
_UNREAD = re.compile(r"\)[*+?{]|\(\?|\\[1-9]|\[[^\]]*(\[|--|&&|~~|\|\|)")


class ModulePattern:
    """Values by pattern; the first that matches a module's path, or the end of it, counts.

    Source: PEFT's ``get_pattern_key``.

    Raises:
        ValueError, re.error: A key is not an expression that is read.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        _check(values)
        self._values = dict(values)
        self._plain = {key for key in values if _PLAIN.fullmatch(key)}
        self._rules = [
            (key.rsplit(".", 1)[-1] if key in self._plain else "", _expression(key), value)
            for key, value in values.items()
        ]
        self._found: dict[str, float | None] = {}  # by path

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> ValuesView[float]:
        return self._values.values()

    def num_comparisons(self, num_paths: int) -> int:
        """The cost of ``value`` for that many paths, in comparisons with plain names."""
        return num_paths * sum(
            1 if key in self._plain else _EXPRESSION_COST for key in self._values
        )

    def value(self, path: str, default: float) -> float:
        """The value of the module with that path."""
        if path not in self._found:
            found = (value for end, e, value in self._rules if path.endswith(end) and e.match(path))
            self._found[path] = next(found, None)
        value = self._found[path]
        return default if value is None else value


def _expression(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _check(keys: Collection[str]) -> None:
    """Refuse expressions whose match may take long, extensions, back references, and the set syntax
    that Python warns about."""
    num_branching = 0
    if len(keys) > MAX_KEYS:
        raise ValueError(f"it has {len(keys)} keys, of at most {MAX_KEYS}")
    for key in keys:
        num_repetitions, num_alternatives = len(_REPETITION.findall(key)), key.count("|")
        if len(key) > _MAX_CHARS:
            raise ValueError(f"{key[:40]!r}... has more than {_MAX_CHARS} characters")
        if num_repetitions > 1 or num_alternatives > _MAX_ALTERNATIVES or _UNREAD.search(key):
            raise ValueError(
                f"{key[:80]!r} is an expression that is not read: at most one repetition, of one "
                f"character or class, and {_MAX_ALTERNATIVES} alternatives"
            )
        num_branching += num_repetitions > 0 or num_alternatives > 0
        if num_branching > _MAX_BRANCHING:
            raise ValueError(f"more than {_MAX_BRANCHING} expressions have a repetition")
        re.compile(key)
