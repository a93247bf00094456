"""Cache of refusals of adapter folders, so that an unchanged folder is not checked again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sglang_elora.adapters.errors import AdapterError

MOST = 1024
"""Number of refusals kept; the oldest is dropped first."""
_MOST_FILES = 1000  # per folder that make up its stamp

Stamp = tuple[tuple[str, int, int, int], ...]
T = TypeVar("T")


class Refusals:
    """Errors of refused folders, valid while the files' sizes, inodes and change times stay equal.

    Errors of the machine (no file descriptor, no memory) say nothing about the adapter and are not
    kept.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Stamp, AdapterError]] = OrderedDict()

    def check(self, name: str, path: str, check: Callable[[], T]) -> T:
        """The result of ``check()``, which is not called if the folder's refusal is known.

        Raises:
            AdapterError: The adapter cannot be served; the text has this ``name``, also if the
                refusal was found under another one.
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
    """A value that changes when the folder's files change; empty if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat()) for entry in islice(entries, _MOST_FILES)]
    except OSError:
        return ()
    return tuple(sorted((n, s.st_size, s.st_ctime_ns, s.st_ino) for n, s in files))
