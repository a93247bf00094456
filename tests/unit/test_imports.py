"""Which folder may import which, checked on the syntax tree: imports go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "sglang_elora"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

LIBRARIES = {
    ".",
    "adapters",
    "control",
    "estimators",
    "kernels",
    "pages",
    "patches",
    "platforms",
    "policy",
    "swapper",
    "tree",
}
"""What our part of SGLang's runtime is made of."""

# Folder -> folders of this package it may import from. Top-level modules are ".".
ALLOWED = {
    ".": {".", "frontend", "platforms", "srt/install"},
    "adapters": {"adapters"},
    "bench": {"bench", "control", "demo", "platforms", "testbed", "workloads"},
    "commands": {
        ".",
        "bench",
        "commands",
        "control",
        "demo",
        "fleet",
        "platforms",
        "srt/install",
        "upstream",
    },
    "control": {"control"},
    "demo": {"control", "demo", "platforms", "testbed"},
    "estimators": {"estimators", "policy"},
    "frontend": {"control", "frontend", "patches", "platforms", "srt/install"},
    "fleet": {"fleet"},
    "kernels": {"kernels"},
    "pages": {"kernels", "pages"},
    "platforms": {"platforms"},
    "policy": {"policy"},
    "sim": {"control", "estimators", "fleet", "policy", "sim", "swapper", "tree", "workloads"},
    "srt": {*LIBRARIES, "srt"},
    "srt/arguments": {*LIBRARIES, "srt/arguments", "srt/lora", "srt/mem_cache"},
    "srt/install": {
        *LIBRARIES,
        "srt",
        "srt/arguments",
        "srt/install",
        "srt/lora",
        "srt/mem_cache",
        "srt/scheduler",
        "srt/tokenizer",
    },
    "srt/lora": {*LIBRARIES, "srt", "srt/lora", "srt/mem_cache"},
    "srt/mem_cache": {*LIBRARIES, "srt/mem_cache"},
    "srt/scheduler": {
        *LIBRARIES,
        "srt",
        "srt/arguments",
        "srt/lora",
        "srt/mem_cache",
        "srt/scheduler",
    },
    "srt/tokenizer": {*LIBRARIES, "srt", "srt/tokenizer"},
    "stock": {".", "srt/lora", "stock"},
    "swapper": {"control", "estimators", "pages", "policy", "swapper", "tree"},
    "testbed": {"platforms", "testbed"},
    "tree": {"policy", "tree"},
    "upstream": {"upstream"},
    "workloads": {"workloads"},
}
MAY_IMPORT_SGLANG = {"frontend", "platforms", "stock", *(name for name in ALLOWED if "srt" in name)}
LINES_MAX = 500


def folder(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return _folder_of(path.relative_to(PACKAGE).with_suffix("").parts)
    return "kernels"


def _folder_of(parts: Sequence[str]) -> str:
    """The folder of the module that ``parts`` of a path or a dotted name begin with."""
    for name in ("/".join(parts[:2]), parts[0]):
        if name in ALLOWED:
            return name
    return "."


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_from_allowed_folders(path: Path) -> None:
    here = folder(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "sglang":
            # The doctor asks SGLang whether it imports at all.
            assert here in MAY_IMPORT_SGLANG or path.name == "doctor.py", f"imports {name}"
        if parts[0] == "sglang_elora":
            target = _folder_of(parts[1:]) if len(parts) > 1 else "."
            if target == "." and here not in MAY_IMPORT_SGLANG | {".", "commands"}:
                assert parts[1] in ("config",), f"{here} imports {name}"
            else:
                assert target in ALLOWED[here], f"{here} imports {name}"


def test_folder_imports_have_no_cycle() -> None:
    """What is allowed has an order, in which each folder imports from earlier ones only."""
    arrows = {here: targets - {here} for here, targets in ALLOWED.items()}
    arrows["patches"] = set()
    for here in arrows:
        if here != ".":  # of the modules at the top, only the configuration is imported
            arrows[here] = arrows[here] - {"."}
    assert set(TopologicalSorter(arrows).static_order()) == set(arrows)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_below_the_line_limit(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    "module",
    ["sglang_elora", "sglang_elora.plugin", "sglang_elora.commands.cli", "sglang_elora.workloads"],
)
def test_light_modules_import_no_heavy_package(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'sglang', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_exports_its_public_names() -> None:
    import sglang_elora

    assert sglang_elora.__all__ == ["SGLANG_PIN", "EloraConfig", "__version__"]
    assert all(hasattr(sglang_elora, name) for name in sglang_elora.__all__)
