"""The private names of SGLang that this package uses are listed, and SGLang has them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_elora

PACKAGE = Path(sglang_elora.__file__).parent
NOT_OF_SGLANGS_OBJECTS = {
    "_execute",  # of ``sglang.lang``, which frontend/install.py checks
    "_getframe",  # Python's
    "_replace",  # of named tuples
}


@pytest.fixture(scope="module")
def attributes() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang_elora.srt.install import attributes, install  # noqa: F401
    return attributes


INSIDE_VLLM = PACKAGE / "bench" / "vllm" / "grouped_lora.py"  # a plugin of vLLM's processes


def trees() -> Iterator[ast.AST]:
    for path in set(PACKAGE.rglob("*.py")) - {INSIDE_VLLM}:
        yield from ast.walk(ast.parse(path.read_text()))


def test_private_names_that_are_used_and_not_our_own_are_listed(attributes: Any) -> None:
    own, used = set(), set()
    for node in trees():
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                own.add(name)
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                own.add(name)
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                used.add(name)
    listed = {name for names in attributes.ATTRIBUTES.values() for name in names}
    assert used - own - NOT_OF_SGLANGS_OBJECTS == listed


def test_sglang_has_every_listed_name(attributes: Any) -> None:
    assert attributes.attribute_problems() == []


def test_preflight_names_an_attribute_and_a_class_that_sglang_lacks(
    attributes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    listed = {cache: ("_all_reduce", "_evict_all"), f"{cache}s": ("_all_reduce",)}
    monkeypatch.setattr(attributes, "ATTRIBUTES", listed)
    lacks, no_class = attributes.attribute_problems()
    assert lacks == f"{cache}._evict_all is not there"
    assert no_class.startswith(f"{cache}s is not there")
