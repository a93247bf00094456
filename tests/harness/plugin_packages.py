"""Packages with an SGLang plugin, written into a folder that is put on PYTHONPATH.

SGLang calls plugins in the order of sys.path, and PYTHONPATH comes before the installed packages:
these plugins run before ours.
"""

from __future__ import annotations

from pathlib import Path

PLUGINS = Path(__file__).with_name("plugins")


def write_plugin(folder: Path, name: str, body: str) -> None:
    """A distribution ``name`` whose plugin runs ``body`` (the text of its ``load``)."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    _write(folder, name, f"def load():\n{lines}\n")


def install_plugin(folder: Path, name: str) -> None:
    """A distribution ``name`` of the file of this name in ``plugins/``."""
    _write(folder, name, (PLUGINS / f"{name}.py").read_text())


def _write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:load\n")
