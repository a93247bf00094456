"""Apply the diffs of ``patches/`` to SGLang's functions, in memory.

By the time SGLang calls a plugin, the target module is imported, its classes
and functions are bound in other modules, and a spawned scheduler is unpickled
from it. So nothing is re-imported or rebound: the diff is applied to the text
of the target's file, both texts are compiled, and each function whose body
differs gets the new ``__code__``. The function object stays the same, and with
it its class, closure, wrappers and every reference to it. Calls that already
run finish in the old code.

What replacing code objects cannot do is refused: a change of module or class
level statements, signatures, defaults, decorators, closures, or a new function.
So is every doubt: a file, a line or a live function that is not the pinned one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import decode_source
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sglang_elora.config import SGLANG_PIN

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_KIND = (
    inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)
_PINNED = f"Install sglang=={SGLANG_PIN} unmodified."
_OURS = "The patch is wrong; patches/README.md says how to make one."
_OTHER = "Remove the plugin that changes it, or start without --elora."


class PatchError(RuntimeError):
    """A patch does not fit the SGLang that is installed, or what runs of it."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One file of ``patches/``: a unified diff of one file of the pinned wheel."""

    name: str  # 01-cache-namespace.patch
    target: str  # sglang/srt/managers/schedule_batch.py
    sha256: str  # of the target as the pinned wheel has it
    why: str
    diff: str

    @property
    def module(self) -> str:
        """Dotted name of the target."""
        return self.target.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def error(self, problem: str, remedy: str) -> PatchError:
        return PatchError(
            f"patch {self.name} of {self.target} (sglang=={SGLANG_PIN}): {problem}. {remedy}"
        )


@dataclass(frozen=True, slots=True)
class _Change:
    qualname: str
    original: CodeType
    patched: CodeType


@dataclass(frozen=True, slots=True)
class _Compiled:
    filename: str  # under which tracebacks find the patched lines
    source: str
    changes: tuple[_Change, ...]


def load_patches(folder: Traversable | None = None) -> tuple[Patch, ...]:
    """The patches of a folder (default: the installed ones), in order of their names.

    Raises:
        PatchError: A header line is missing, or there is no patch at all.
    """
    folder = files("sglang_elora.patches") if folder is None else folder
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".patch")]
    if not found:
        raise PatchError(f"no *.patch in {folder}: install sglang_elora again, with its data.")
    return tuple(
        _read(entry.name, entry.read_text(encoding="utf-8"))
        for entry in sorted(found, key=lambda entry: entry.name)
    )


def preflight(patch: Patch) -> list[str]:
    """What keeps the patch from being applied here; empty if nothing. Imports the target."""
    try:
        _plan(patch)
    except PatchError as error:
        return [str(error)]
    return []


def apply_patch(patch: Patch) -> tuple[str, ...]:
    """Put the patch in effect: all of its functions, or on an error none.

    Returns:
        Dotted names of the functions changed by this call; none if it was applied before.

    Raises:
        PatchError: The file, the diff or a live function is not as expected.
    """
    compiled, plan = _plan(patch)
    lines = compiled.source.splitlines(keepends=True)
    linecache.cache[compiled.filename] = (len(compiled.source), None, lines, compiled.filename)
    pending = [(function, change) for function, change in plan if not _runs(function, change)]
    for function, change in pending:
        function.__code__ = change.patched
    return tuple(f"{patch.module}.{change.qualname}" for _, change in pending)


def is_applied(patch: Patch) -> bool:
    """Whether every function of the patch runs its patched code now."""
    try:
        _, plan = _plan(patch)
    except PatchError:
        return False
    return all(_runs(function, change) for function, change in plan)


def patched_source(patch: Patch, source: str) -> str:
    """Apply the diff to a text. Strict: lines and line numbers match exactly, or it is refused."""
    lines = ("--- " + patch.diff.partition("\n--- ")[2]).removesuffix("\n").split("\n")
    if [line.split("\t")[0] for line in lines[:2]] != [
        f"--- a/{patch.target}",
        f"+++ b/{patch.target}",
    ]:
        raise patch.error(f"its --- and +++ lines do not name a/ and b/{patch.target}", _OURS)
    old, new = source.split("\n"), list[str]()
    done, at = 0, 2  # lines of `old` dealt with; the next line of the diff
    while at < len(lines):
        header, at = _HUNK.match(lines[at]), at + 1
        if header is None:
            raise patch.error(f"{lines[at - 1]!r} is not a hunk header", _OURS)
        old_start, old_left, new_start, new_left = (int(x or 1) for x in header.groups())
        new += old[done : old_start - 1]
        if old_start - 1 < done or len(new) != new_start - 1 or not old_left:
            raise patch.error(f"hunk {header[0]!r} is out of place or without context", _OURS)
        done = old_start - 1
        while old_left > 0 or new_left > 0:
            line, at = lines[at] if at < len(lines) else "end of file", at + 1
            tag, text = line[:1] or " ", line[1:]
            if tag not in " -+":
                raise patch.error(f"{line!r} in hunk {header[0]!r} is no diff line", _OURS)
            if tag != "+":
                if done >= len(old) or old[done] != text:
                    raise patch.error(f"line {done + 1} of the target is not {text!r}", _OURS)
                done, old_left = done + 1, old_left - 1
            if tag != "-":
                new.append(text)
                new_left -= 1
        if old_left or new_left:
            raise patch.error(f"hunk {header[0]!r} has other line counts than it says", _OURS)
    return "\n".join(new + old[done:])


def _read(name: str, diff: str) -> Patch:
    header = dict(re.findall(r"^# (\w+): (.+)$", diff.partition("\n--- ")[0], re.MULTILINE))
    missing = {"target", "sha256", "why"} - header.keys()
    if missing:
        raise PatchError(f"patch {name} has no header line for {sorted(missing)}. {_OURS}")
    return Patch(name, header["target"], header["sha256"], header["why"], diff)


def _plan(patch: Patch) -> tuple[_Compiled, list[tuple[FunctionType, _Change]]]:
    """Each live function of the patch with its change. Raises PatchError on any doubt."""
    try:
        module = importlib.import_module(patch.module)
        path = inspect.getsourcefile(module) or ""
        raw = Path(path).read_bytes()
    except (ImportError, OSError, TypeError) as error:
        raise patch.error(f"its source cannot be imported and read: {error}", _PINNED) from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != patch.sha256:
        raise patch.error(f"{path} has sha256 {digest}, not {patch.sha256}", _PINNED)
    compiled = _compile(patch, path, decode_source(raw))
    plan = []
    for change in compiled.changes:
        function = _live_function(patch, module, change.qualname)
        if _bare(function.__code__) not in (_bare(change.original), _bare(change.patched)):
            raise patch.error(f"another plugin or patch changed {change.qualname}", _OTHER)
        plan.append((function, change))
    return compiled, plan


@lru_cache(maxsize=None)  # preflight, apply and verify ask for the same
def _compile(patch: Patch, path: str, source: str) -> _Compiled:
    filename = f"{path} [sglang_elora {patch.name}]"
    text = patched_source(patch, source)
    trees, codes = [ast.parse(source)], [compile(source, path, "exec", dont_inherit=True)]
    try:
        trees.append(ast.parse(text))
        codes.append(compile(text, filename, "exec", dont_inherit=True))
    except SyntaxError as error:
        raise patch.error(f"the patched file does not compile: {error}", _OURS) from error
    (old_rest, old_bodies), (new_rest, new_bodies) = map(_outline, trees)
    if old_rest != new_rest:
        raise patch.error(
            "it changes more than function bodies: module or class level, a signature, a default, "
            "a decorator, or the set of functions",
            _OURS,
        )
    changes = []
    for qualname in (name for name in old_bodies if old_bodies[name] != new_bodies[name]):
        if len(old_bodies[qualname]) > 1:
            raise patch.error(f"{qualname} is defined more than once", _OURS)
        original, patched = (_function_code(patch, code, qualname) for code in codes)
        if original.co_freevars != patched.co_freevars:
            raise patch.error(f"it changes what {qualname} closes over", _OURS)
        if original.co_flags & _KIND != patched.co_flags & _KIND:
            raise patch.error(f"it makes {qualname} (not) async or a generator", _OURS)
        changes.append(_Change(qualname, original, patched))
    if not changes:
        raise patch.error("it changes no function", _OURS)
    return _Compiled(filename, text, tuple(changes))


def _outline(tree: ast.Module) -> tuple[str, dict[str, list[str]]]:
    """A module without the bodies of its outermost functions, and those bodies by qualname."""
    bodies: dict[str, list[str]] = {}

    def cut(node: ast.AST, scope: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = ast.dump(ast.Module(node.body, []))
            bodies.setdefault(scope + node.name, []).append(body)
            node.body = []
            return
        if isinstance(node, ast.ClassDef):
            scope += f"{node.name}."
        for child in ast.iter_child_nodes(node):
            cut(child, scope)

    cut(tree, "")
    return ast.dump(tree), bodies


def _function_code(patch: Patch, code: CodeType, qualname: str) -> CodeType:
    for name in qualname.split("."):
        inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        if len(inner) != 1:
            raise patch.error(f"{name} of {qualname} is compiled {len(inner)} times", _OURS)
        code = inner[0]
    return code


def _live_function(patch: Patch, module: ModuleType, qualname: str) -> FunctionType:
    """The function behind a name now, beneath its decorators and the hooks put on it."""
    found: Any = module
    try:
        for name in qualname.split("."):
            found = vars(found)[name]
    except (KeyError, TypeError):
        raise patch.error(f"{qualname} is not there; its class was replaced", _OTHER) from None
    for layer, found in _layers(found):
        cells = getattr(layer, "__closure__", None) or ()
        if isinstance(layer, FunctionType) and not any(_holds(cell, found) for cell in cells):
            raise patch.error(f"another plugin's {layer.__module__} replaced {qualname}", _OTHER)
    if not isinstance(found, FunctionType):
        raise patch.error(f"{qualname} is a {type(found).__name__}, not a function", _OTHER)
    return found
