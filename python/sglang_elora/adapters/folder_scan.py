"""Scan of a watched folder for new adapters: which of its subfolders can be loaded now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_elora.adapters.weight_files import CONFIG_FILE

PATIENT_SCANS = 10
"""Equal scans in a row after which a subfolder without a config is reported. Raising it allows
slower copies, and reports an incomplete folder later."""

_Signature = tuple[tuple[str, int, int], ...]  # of each entry: name, bytes, modification time (ns)


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A new or changed subfolder. ``problem`` says why it may not be loaded, or is empty."""

    name: str  # of the subfolder and the adapter
    path: Path
    problem: str


class FolderScan:
    """Reports each non-empty subfolder once, and again only after it has changed.

    A subfolder that is still being written is skipped: it is reported when two scans in a row see
    the same files, or ``PATIENT_SCANS`` scans if it has no config, since a slow copy may write the
    config last. Names that begin with a dot are ignored, so that a folder can be filled under such
    a name and then be renamed.

    Nothing outside the folder is served: neither a subfolder nor a file in it may be a link that
    leads out of it.

    Args:
        root: The folder; it may be created later.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, _Signature] = {}  # at the last scan
        self._told: dict[str, _Signature] = {}  # when the subfolder was last reported
        self._num_same: dict[str, int] = {}  # scans in a row that saw the current signature

    def scan(self) -> list[FoundAdapter]:
        """New and changed subfolders by name. Blocks for a few system calls per subfolder."""
        seen = dict(self._subfolders())
        self._num_same = {
            name: self._num_same.get(name, 0) + 1 if signature == self._seen.get(name) else 1
            for name, signature in seen.items()
        }
        found = []
        for name, signature in sorted(seen.items()):
            path, has_config = self._root / name, CONFIG_FILE in (file for file, *_ in signature)
            is_whole = self._num_same[name] >= (2 if has_config else PATIENT_SCANS)
            if is_whole and signature != self._told.get(name):
                self._told[name] = signature
                problem = leads_out(self._root, path) if has_config else _no_config(path)
                found.append(FoundAdapter(name, path, problem))
        self._seen = seen
        self._told = {name: self._told[name] for name in self._told if name in seen}
        return found

    def _subfolders(self) -> Iterator[tuple[str, _Signature]]:
        try:
            entries = list(os.scandir(self._root))
        except OSError:  # not created yet, or removed
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _inner(entry)]
            except OSError:  # a dangling link, or a file removed since
                continue
            if files:
                yield entry.name, tuple(sorted(files))


def leads_out(root: Path, path: Path) -> str:
    """Why an adapter's folder, or a file in it, is not inside ``root``; empty if all are."""
    inside = root.resolve()
    try:
        for inner in (path, *path.iterdir()):
            if not inner.resolve().is_relative_to(inside):
                return f"{inner} is a link that leads out of {inside}"
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"it cannot be read: {error}"
    return ""


def _inner(entry: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    return list(os.scandir(entry)) if entry.is_dir() else []


def _no_config(path: Path) -> str:
    below = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
    where = f"; its folder {below[-1]} has one: move or link that one here" if below else ""
    return f"it has no {CONFIG_FILE}{where}"
