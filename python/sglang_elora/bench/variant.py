"""Variants of a measured server: an SGLang plugin, written for the run, that changes one thing."""

from __future__ import annotations

import ast
from pathlib import Path


def write_plugin(folder: Path, source: Path, variant: str) -> tuple[Path, Path]:
    """Write a distribution whose plugin calls the function ``variant`` of the file ``source``.

    Returns:
        Folders for PYTHONPATH: the distribution's and the file's.

    Raises:
        ValueError: The file has no such function; SGLang would only log that.
    """
    body = ast.parse(source.read_text()).body
    known = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    public = [name for name in known if not name.startswith("_")]
    if variant not in public:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(public)} ({source})")
    name = f"variant_{variant}"
    info = folder / variant / f"{name}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entry = f"{name} = {source.stem}:{variant}"
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entry}\n")
    return info.parent, source.parent
