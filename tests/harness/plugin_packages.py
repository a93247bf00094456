"""Write a package with an SGLang plugin into a folder, to be put on PYTHONPATH."""

from __future__ import annotations

from pathlib import Path


def write_plugin(folder: Path, name: str, body: str) -> None:
    """A distribution ``name`` whose plugin runs ``body`` (the text of its ``load``).

    SGLang calls plugins in the order of sys.path, and PYTHONPATH comes before the installed
    packages: this plugin runs before ours.
    """
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / f"{name}.py").write_text(f"def load():\n{lines}\n")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:load\n")
