"""Comparison of the places in SGLang that this package relies on, between two versions."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from sglang_elora.upstream.seams import OURS, Kind, Seam, member_names
from sglang_elora.upstream.sources import SERVER_ARGS, Class, Definition, Files, Function, Sources

_LOOKED_INTO = ("sglang/srt/", "sglang/lang/")
"""Folders that are searched for names without a known class, and for words."""


class Verdict(Enum):
    """Result of comparing one place, worst first."""

    GONE = "gone"
    CHANGED = "changed"
    READ_AGAIN = "to be read again"
    SAME = "unchanged"


@dataclass(frozen=True)
class Finding:
    """The verdict on one place, with lines that describe the differences."""

    seam: Seam
    verdict: Verdict
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """Comparable properties of one place. ``outside`` is its interface, part by part: what callers,
    readers and overrides depend on. ``inside`` is its implementation."""

    outside: tuple[str, ...]
    inside: tuple[str, ...] = ()
    parts: Mapping[str, str] | None = None  # parts whose changes are listed by name


class UnknownSeam(LookupError):
    """The pinned SGLang lacks a place that our sources refer to."""


def compare(
    seams: Sequence[Seam], pinned: Sources, other: Sources, patches: Mapping[str, str]
) -> list[Finding]:
    """The finding for each place in ``other``.

    A name of an unknown class is compared only if no class of ours has it too.

    Raises:
        UnknownSeam: ``pinned`` does not have a place.
    """
    findings = [
        _compare_one(seam, pinned, other, patches) for seam in seams if seam.kind is not Kind.NAME
    ]
    names = [seam for seam in seams if seam.kind is Kind.NAME]
    if names:
        ours = member_names(pinned.packages[OURS], f"{OURS}/")
        before, after = (_names(each.packages["sglang"]) for each in (pinned, other))
        for seam in names:
            if seam.name in before - ours:
                verdict = Verdict.SAME if seam.name in after else Verdict.GONE
                findings.append(Finding(seam, verdict))
    return findings


def _compare_one(
    seam: Seam, pinned: Sources, other: Sources, patches: Mapping[str, str]
) -> Finding:
    before, after = (_facts(seam, each, patches) for each in (pinned, other))
    if seam.kind is Kind.ADDED:
        if after is None:
            return Finding(seam, Verdict.SAME)
        return Finding(seam, Verdict.CHANGED, ("SGLang's class has it now",))
    if before is None:
        raise UnknownSeam(f"{seam.name} ({seam.used_in}) is not in the pinned SGLang")
    return _finding(seam, before, after)


def _finding(seam: Seam, before: _Facts, after: _Facts | None) -> Finding:
    if after is None:
        return Finding(seam, Verdict.GONE)
    if before.outside != after.outside:
        return Finding(seam, Verdict.CHANGED, _differences(before.outside, after.outside))
    if before.parts is not None and after.parts is not None and before.parts != after.parts:
        return Finding(seam, Verdict.READ_AGAIN, tuple(_changes(before.parts, after.parts)))
    if before.inside != after.inside:
        return Finding(seam, Verdict.READ_AGAIN)
    return Finding(seam, Verdict.SAME)


def _differences(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    gone = [f"- {part}" for part in before if part not in after]
    new = [f"+ {part}" for part in after if part not in before]
    return tuple(gone + new) or ("in another order",)


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    for word, names in (
        ("gone", [name for name in before if name not in after]),
        ("new", [name for name in after if name not in before]),
        ("another", [name for name in before if before[name] != after.get(name, before[name])]),
    ):
        if names:
            yield f"{word}: {', '.join(names)}"


def _facts(seam: Seam, sources: Sources, patches: Mapping[str, str]) -> _Facts | None:
    files = sources.packages["sglang"]
    if seam.kind is Kind.WORD:
        return _Facts((), parts=dict(_places_of(seam.name, files)))
    if seam.kind is Kind.PATCH:
        text = files.read(seam.name)
        if text is None:
            return None
        fits = "fits" if patch_fits(patches[seam.used_in], text) else "does not fit"
        return _Facts((fits,), (hashlib.sha256(text.encode()).hexdigest(),))
    if seam.name == SERVER_ARGS and seam.kind is Kind.FIELD:
        return _Facts((), parts=sources.server_fields())
    found = sources.resolve(seam.name)
    if found is None and seam.kind is Kind.FIELD:
        found = sources.server_field(seam.name.rpartition(".")[2])
    if found is None:
        return None
    of_class = found.as_class
    if seam.kind is Kind.BASE and of_class is not None:
        overridden = set(seam.detail.split())
        return _Facts((), parts=dict(_methods(of_class, overridden)))
    if seam.kind is Kind.FIELD:
        return _field(found)
    facts = _of(found, is_called=seam.kind is not Kind.IMPORT)
    if seam.kind is Kind.HOOK and not found.as_class:
        leading = len(seam.detail.split())
        return _Facts(facts.outside[: leading + 1], (*facts.outside, *facts.inside))
    return facts


def _of(found: Definition, *, is_called: bool) -> _Facts:
    """The facts of a definition; a function's interface is its kind, then its parameters."""
    if not found.nodes:  # a module, or an attribute that methods set
        return _Facts(("attribute" if found.owner is not None else "module",))
    of_class = found.as_class
    if of_class is not None:
        return _Facts(("class", *(_constructor(of_class) if is_called else ())))
    outside: list[str] = []
    inside: list[str] = []
    for node in found.nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
            kind = "async function" if isinstance(node, ast.AsyncFunctionDef) else "function"
            outside += [f"{marks}{kind}", *(_parameters(node) if is_called else ())]
            inside.append(_body(node))
        elif isinstance(node, ast.AnnAssign) and found.owner is not None:
            outside.append(ast.unparse(node.annotation))
        else:
            outside.append("value")
            inside.append(ast.unparse(node))
    return _Facts(tuple(outside), tuple(inside))


def _parameters(node: Function) -> Iterator[str]:
    """Parameters' names and defaults, without annotations, which have no effect at run time."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    for each in ast.walk(arguments.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    yield from _split(ast.unparse(arguments.args))


def _split(text: str) -> Iterator[str]:
    """Parts of the text between commas outside brackets."""
    depth, part = 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += character
    if part.strip():
        yield part.strip()


def _body(node: Function) -> str:
    has_text = ast.get_docstring(node, clean=False) is not None
    return ast.dump(ast.Module(node.body[has_text:], []))


def _constructor(of_class: Class) -> Iterator[str]:
    """The parameters of ``__init__``, or the annotated fields that generate it."""
    made = of_class.find("__init__")
    if made is not None and made.nodes and isinstance(made.nodes[0], ast.FunctionDef):
        yield from _parameters(made.nodes[0])
        return
    for each in reversed(list(of_class.lineage())):
        for node in each.node.body:
            if isinstance(node, ast.AnnAssign):
                yield ast.unparse(node)


def _methods(base: Class, overridden: set[str]) -> Iterator[tuple[str, str]]:
    """(name, parameters and body) of each method that a subclass of ours inherits."""
    seen = set(overridden)
    for each in base.lineage():
        for name, nodes in each.own.items():
            if name not in seen and nodes:
                seen.add(name)
                texts = (_body(n) + ast.dump(n.args) for n in nodes if isinstance(n, Function))
                text = "".join(texts)
                if text:
                    yield name, text


def _field(found: Definition) -> _Facts:
    """The facts of a configuration field. Interface: type, default, and whether a flag sets it;
    implementation: choices and texts."""
    node = found.nodes[0] if found.nodes else None
    if not isinstance(node, ast.AnnAssign):
        return _Facts(("no field",))
    annotation = ast.unparse(node.annotation)
    of_type, _, _ = annotation.removeprefix("A[").partition(", ")
    is_set = "set by no flag" if "no_cli=True" in annotation else "set by a flag"
    return _Facts((of_type, f"default {ast.unparse(node.value or node)}", is_set), (annotation,))


def _places_of(word: str, files: Files) -> Iterator[tuple[str, str]]:
    """(file, number of occurrences) of a word."""
    for folder in _LOOKED_INTO:
        for file in files.below(folder):
            text = files.read(file) or ""
            if word in text and (count := len(re.findall(rf"\b{word}\b", text))):
                yield file, str(count)


def _names(files: Files) -> set[str]:
    return set[str]().union(*(member_names(files, folder) for folder in _LOOKED_INTO))


def patch_fits(patch: str, text: str) -> bool:
    """Whether the lines that each hunk expects occur exactly once in the text, at any place."""
    for hunk in re.split(r"^@@.*@@.*\n", patch, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[:1] in (" ", "-"))
        if text.count(old) != 1:
            return False
    return True
