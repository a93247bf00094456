"""New adapters in a folder that is watched: which of its subfolders can be loaded now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_elora.adapters.weight_files import CONFIG_FILE

_Signature = tuple[tuple[str, int, int], ...]  # of each file: name, bytes, modified at


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A subfolder with something new. ``problem`` says why it may not be loaded, or is empty."""

    name: str  # of the folder, and of the adapter
    path: Path
    problem: str


class FolderScan:
    """Finds each subfolder with an adapter's config once, and again only after it has changed.

    What is still being written is left for later: a subfolder counts when two scans in a row see
    the same files. Names that begin with a dot are left out, so that a folder can be filled under
    such a name and then be renamed.

    Nothing outside the folder is served: neither a subfolder nor a file in it may be a link that
    leads out of it.

    Args:
        root: The folder; it may come later.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, _Signature] = {}  # as of the last scan
        self._told: dict[str, _Signature] = {}  # as of when it was returned

    def scan(self) -> list[FoundAdapter]:
        """What is new, in order of names. Blocks for some system calls per subfolder."""
        seen = dict(self._subfolders())
        found = []
        for name, signature in sorted(seen.items()):
            if signature == self._seen.get(name) and signature != self._told.get(name):
                self._told[name] = signature
                path = self._root / name
                found.append(FoundAdapter(name, path, leads_out(self._root, path)))
        self._seen = seen
        self._told = {name: self._told[name] for name in self._told if name in seen}
        return found

    def _subfolders(self) -> Iterator[tuple[str, _Signature]]:
        try:
            entries = list(os.scandir(self._root))
        except OSError:  # not there yet, or not any more
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _files(entry)]
            except OSError:  # a link to nowhere, or a file that has just gone
                continue
            if any(name == CONFIG_FILE for name, _, _ in files):
                yield entry.name, tuple(sorted(files))


def leads_out(root: Path, path: Path) -> str:
    """Why this adapter's folder, or a file in it, does not lie in ``root``; empty if all do."""
    inside = root.resolve()
    try:
        for inner in (path, *path.iterdir()):
            if not inner.resolve().is_relative_to(inside):
                return f"{inner} is a link that leads out of {inside}"
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        return f"it cannot be read: {error}"
    return ""


def _files(entry: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    return [inner for inner in os.scandir(entry) if inner.is_file()] if entry.is_dir() else []
