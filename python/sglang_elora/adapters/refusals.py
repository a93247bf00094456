"""What was found wrong with adapters' folders, so that it is not looked for again and again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sglang_elora.adapters.errors import AdapterError

MOST = 1024
_MOST_FILES = 1000

Stamp = tuple[tuple[str, int, int, int], ...]
T = TypeVar("T")


class Refusals:
    """Of folders that are as they were when they were refused, by the files' sizes and times.

    What the machine could not do (open another file, find memory) says nothing of the adapter, and
    is not kept.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Stamp, AdapterError]] = OrderedDict()

    def check(self, name: str, path: str, check: Callable[[], T]) -> T:
        """``check()``, unless it is known what it will raise.

        Raises:
            AdapterError: The adapter cannot be served under any name; the text has this one.
        """
        stamp = _stamp(Path(path))
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            error = known[1]
            raise AdapterError(name, error.where, error.reason, error.remedy)
        try:
            return check()
        except AdapterError as error:
            if stamp and not isinstance(error.__cause__, OSError | MemoryError):
                self._known[path] = (stamp, error)
                while len(self._known) > MOST:
                    self._known.popitem(last=False)
            raise


def _stamp(folder: Path) -> Stamp:
    """Changes with the folder's files; empty if it is no folder."""
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat()) for entry in islice(entries, _MOST_FILES)]
    except OSError:
        return ()
    return tuple(sorted((n, s.st_size, s.st_ctime_ns, s.st_ino) for n, s in files))
