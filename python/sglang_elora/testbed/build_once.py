"""Atomic building of a directory, which is rebuilt only when its parameters change."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

MANIFEST_NAME = "demo_manifest.json"
"""File with the parameters of a built directory; marks it as replaceable by the demo."""


def build_once(
    directory: Path, parameters: Mapping[str, object], build: Callable[[Path], None]
) -> Path:
    """Fill ``directory`` with the output of ``build`` for ``parameters``, and return it.

    ``build`` fills a temporary directory with the same parent, which is then renamed: a reader
    never sees half a directory, and a crash leaves the old state. Nothing is written if the
    manifest in ``directory`` already equals ``parameters`` (plain JSON values).

    Raises:
        ValueError: ``directory`` exists, is not empty, and was not made by this function; it is
            not changed.
    """
    wanted = json.loads(json.dumps(parameters))
    if _manifest(directory) == wanted:
        return directory
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        build(draft)
        (draft / MANIFEST_NAME).write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n")
        draft.chmod(0o755)  # mkdtemp makes it private
        _put_in_place(draft, directory, wanted)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _manifest(directory: Path) -> object:
    """The parameters that ``directory`` was built with, or None if it has no manifest."""
    path = directory / MANIFEST_NAME
    return json.loads(path.read_text()) if path.is_file() else None


def _refuse_foreign(directory: Path) -> None:
    if directory.exists() and _manifest(directory) is None and any(directory.iterdir()):
        raise ValueError(
            f"{directory} is not empty and holds no {MANIFEST_NAME}, so it was not made by the "
            "demo and will not be replaced: choose another directory, or empty this one"
        )


def _put_in_place(draft: Path, directory: Path, wanted: object) -> None:
    """Rename ``draft`` to ``directory``; of two equal concurrent builds the second is discarded."""
    if directory.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        try:
            os.rename(directory, retired / "was")
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    try:
        os.rename(draft, directory)
    except OSError:
        if _manifest(directory) != wanted:
            raise
