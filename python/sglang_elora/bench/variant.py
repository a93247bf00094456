"""Variants of a measured server: a plugin, written for the run, that changes one thing."""

from __future__ import annotations

import ast
from pathlib import Path

_STOCK_VARIANTS = "sglang_elora.stock.variants"


def write_plugin(
    folder: Path, source: Path, variant: str, group: str = "sglang.srt.plugins"
) -> tuple[Path, Path]:
    """Write a distribution whose plugin calls the function ``variant`` of the file ``source``.

    Args:
        group: The group of entry points that the server reads.

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
    return _distribution(folder, variant, f"{source.stem}:{variant}", group), source.parent


def write_stock_plugin(folder: Path, variant: str) -> Path:
    """Write a distribution whose plugin calls the function ``variant`` of ``stock.variants``.

    Returns:
        Its folder, for PYTHONPATH.
    """
    return _distribution(folder, f"stock_{variant}", f"{_STOCK_VARIANTS}:{variant}")


def _distribution(folder: Path, label: str, target: str, group: str = "sglang.srt.plugins") -> Path:
    name = f"variant_{label}"
    info = folder / label / f"{name}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entry = f"{name} = {target}"
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    return info.parent
