"""Who may import what, checked on the syntax tree: imports go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "sglang_elora"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Folder -> folders of this package it may import from. Top-level modules are ".".
ALLOWED = {
    ".": {".", "bench", "demo", "host", "platforms", "upstream"},
    "adapters": {"adapters"},
    "bench": {"bench", "demo", "platforms", "workloads"},
    "control": {"control"},
    "demo": {"demo", "platforms"},
    "estimators": {"estimators"},
    "host": {
        ".",
        "adapters",
        "control",
        "estimators",
        "host",
        "kernels",
        "pages",
        "patches",
        "platforms",
        "policy",
        "swapper",
        "tree",
    },
    "kernels": {"kernels"},
    "pages": {"kernels", "pages"},
    "platforms": {"platforms"},
    "policy": {"policy"},
    "sim": {"estimators", "policy", "sim", "tree", "workloads"},
    "swapper": {"pages", "swapper", "tree"},
    "tree": {"policy", "tree"},
    "upstream": {"upstream"},
    "workloads": {"workloads"},
}
MAY_IMPORT_SGLANG = {"host", "platforms"}
LINES_MAX = 500


def folder(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        inner = path.relative_to(PACKAGE).parts
        return inner[0] if len(inner) > 1 else "."
    return "kernels"


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_edges(path: Path) -> None:
    here = folder(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "sglang":
            # The doctor asks SGLang whether it imports at all.
            assert here in MAY_IMPORT_SGLANG or path.name == "doctor.py", f"imports {name}"
        if parts[0] == "sglang_elora":
            is_folder = len(parts) > 1 and parts[1] in ALLOWED
            target = parts[1] if is_folder else "."
            if target == "." and here not in (".", "host"):
                assert parts[1] in ("config",), f"{here} imports {name}"
            else:
                assert target in ALLOWED[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    "module", ["sglang_elora", "sglang_elora.plugin", "sglang_elora.cli", "sglang_elora.workloads"]
)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'sglang', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    import sglang_elora

    assert sglang_elora.__all__ == ["SGLANG_PIN", "EloraConfig", "__version__"]
    assert all(hasattr(sglang_elora, name) for name in sglang_elora.__all__)
