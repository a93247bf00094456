"""Applies the diffs of ``patches/`` to SGLang's functions, in memory.

When SGLang calls a plugin, the target module is already imported, its classes and functions are
bound in other modules, and a spawned scheduler is unpickled from it. So nothing is re-imported or
rebound: the diff is applied to the text of the target's file, both texts are compiled, and each
function whose body differs gets the new ``__code__``, and the defaults of parameters that the patch
appends. The function object stays the same, with its class, closure, wrappers and all references
to it. Running calls finish in the old code.

Changes that a code object cannot express are refused: module or class level statements, decorators,
closures, existing parameters, new functions. A file, line or live function that differs from the
pinned version is refused, too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import linecache
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import decode_source
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sglang_elora.config import SGLANG_PIN

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_NO_PARAMETERS = ast.arguments([], [], None, [], [], None, [])
_KIND = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_PINNED = f"Install sglang=={SGLANG_PIN} unmodified."
_OURS = "The patch is wrong; patches/README.md says how to make one."
_OTHER = "Remove the plugin that changes it, or start without --elora."
SERVER = "--elora"


class PatchError(RuntimeError):
    """A patch does not match the installed SGLang, or a function that runs in this process."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One file of ``patches/``: a unified diff of one file of the pinned wheel."""

    name: str  # 01-cache-namespace.patch
    target: str  # sglang/srt/managers/schedule_batch.py
    sha256: str  # of the target in the pinned wheel
    why: str
    diff: str
    when: str = SERVER  # what selects it: --elora, or importing sglang_elora.lang

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
    added: tuple[object, ...] = ()  # defaults of new last parameters
    added_by_keyword: tuple[tuple[str, object], ...] = ()  # (name, default) of keyword-only ones


@dataclass(frozen=True, slots=True)
class _Compiled:
    filename: str  # name under which tracebacks find the patched lines
    source: str
    changes: tuple[_Change, ...]


def load_patches(folder: Path | None = None) -> tuple[Patch, ...]:
    """The patches of a folder (default: the installed ones), in order of their names.

    Raises:
        PatchError: A header line is missing, or there is no patch at all.
    """
    source = files("sglang_elora.patches") if folder is None else folder
    texts = {entry.name: entry for entry in source.iterdir() if entry.name.endswith(".patch")}
    if not texts:
        raise PatchError(f"no *.patch in {source}: install sglang_elora again, with its data.")
    return tuple(_read(name, texts[name].read_text(encoding="utf-8")) for name in sorted(texts))


def preflight(patch: Patch) -> list[str]:
    """The problems that prevent the patch from being applied; empty if none. Imports the target."""
    try:
        _plan(patch)
    except PatchError as error:
        return [str(error)]
    return []


def apply_patch(patch: Patch) -> tuple[str, ...]:
    """Apply the patch to all of its functions, or on an error to none.

    Returns:
        Dotted names of the functions changed by this call; none if it was applied before.

    Raises:
        PatchError: The file, the diff or a live function is not as expected.
    """
    compiled, plan = _plan(patch)
    lines = [f"{line}\n" for line in compiled.source.split("\n")]
    linecache.cache[compiled.filename] = (len(compiled.source), None, lines, compiled.filename)
    pending = [(function, change) for function, change in plan if not _runs(function, change)]
    for function, change in pending:
        _set_code(function, change)
    return tuple(f"{patch.module}.{change.qualname}" for _, change in pending)


def is_applied(patch: Patch) -> bool:
    """Whether every function of the patch currently runs its patched code."""
    try:
        _, plan = _plan(patch)
    except PatchError:
        return False
    return all(_runs(function, change) for function, change in plan)


def patched_source(patch: Patch, source: str) -> str:
    """Apply the diff to a text. Raises PatchError unless each line matches at its line number."""
    head, *hunks = re.split(r"^(?=@@ )", patch.diff, flags=re.MULTILINE)
    if not head.endswith(f"\n--- a/{patch.target}\n+++ b/{patch.target}\n") or not hunks:
        raise patch.error("no hunks behind --- a/ and +++ b/ lines with the target", _OURS)
    old, new = source.split("\n"), list[str]()
    done = 0  # lines of `old` copied, replaced or removed
    for hunk in hunks:
        header, *lines = hunk.removesuffix("\n").split("\n")
        match = _HUNK.match(header)
        before = [line[1:] for line in lines if line[:1] in " -"]
        after = [line[1:] for line in lines if line[:1] in " +"]
        if match is None or not all(line[:1] in " -+" for line in lines):
            raise patch.error(f"hunk {header!r} is not of a unified diff", _OURS)
        start, count, new_start, new_count = (int(number or 1) for number in match.groups())
        if (len(before), len(after)) != (count, new_count) or not before:
            raise patch.error(f"hunk {header!r} has other line counts, or no context", _OURS)
        new += old[done : start - 1]
        if start <= done or len(new) != new_start - 1:
            raise patch.error(f"hunk {header!r} is out of place", _OURS)
        for number, line in enumerate(before, start):
            if old[number - 1 : number] != [line]:
                raise patch.error(f"line {number} of the target is not {line!r}", _OURS)
        new += after
        done = start - 1 + count
    return "\n".join(new + old[done:])


def _read(name: str, diff: str) -> Patch:
    header = dict(re.findall(r"^# (\w+): (.+)$", diff.partition("\n--- ")[0], re.MULTILINE))
    missing = {"target", "sha256", "why"} - header.keys()
    if missing:
        raise PatchError(f"patch {name} has no header line for {sorted(missing)}. {_OURS}")
    when = header.get("when", SERVER)
    return Patch(name, header["target"], header["sha256"], header["why"], diff, when)


def _plan(patch: Patch) -> tuple[_Compiled, list[tuple[FunctionType, _Change]]]:
    """The live functions of the patch with their changes. Raises PatchError if the target or a
    function differs from the pinned version."""
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


@cache  # preflight, apply and verify compile the same patch
def _compile(patch: Patch, path: str, source: str) -> _Compiled:
    filename = f"{path} [sglang_elora {patch.name}]"
    text = patched_source(patch, source)
    trees, codes = [ast.parse(source)], [compile(source, path, "exec", dont_inherit=True)]
    try:
        trees.append(ast.parse(text))
        codes.append(compile(text, filename, "exec", dont_inherit=True))
    except SyntaxError as error:
        raise patch.error(f"the patched file does not compile: {error}", _OURS) from error
    (old_rest, old_functions), (new_rest, new_functions) = map(_outline, trees)
    if old_rest != new_rest:
        raise patch.error(
            "it changes more than functions: module or class level, a decorator, or the set of "
            "functions",
            _OURS,
        )
    changes = []
    for qualname, old in old_functions.items():
        new = new_functions[qualname]
        if [function.dumped for function in old] == [function.dumped for function in new]:
            continue
        if len(old) > 1:
            raise patch.error(f"{qualname} is defined more than once", _OURS)
        added = _added_defaults(patch, qualname, old[0].parameters, new[0].parameters)
        original, patched = (_function_code(patch, code, qualname) for code in codes)
        if original.co_freevars != patched.co_freevars:
            raise patch.error(f"it changes what {qualname} closes over", _OURS)
        if original.co_flags & _KIND != patched.co_flags & _KIND:
            raise patch.error(f"it makes {qualname} (not) async or a generator", _OURS)
        changes.append(_Change(qualname, original, patched, *added))
    if not changes:
        raise patch.error("it changes no function", _OURS)
    return _Compiled(filename, text, tuple(changes))


@dataclass(frozen=True, slots=True)
class _Function:
    parameters: ast.arguments
    dumped: str  # parameters and body


def _outline(tree: ast.Module) -> tuple[str, dict[str, list[_Function]]]:
    """Dump of a module without the parameters and bodies of its outermost functions, and these
    functions by qualname."""
    functions: dict[str, list[_Function]] = {}

    def cut(node: ast.AST, scope: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            dumped = ast.dump(node.args) + ast.dump(ast.Module(node.body, []))
            functions.setdefault(scope + node.name, []).append(_Function(node.args, dumped))
            node.args, node.body = _NO_PARAMETERS, []
            return
        if isinstance(node, ast.ClassDef):
            scope += f"{node.name}."
        for child in ast.iter_child_nodes(node):
            cut(child, scope)

    cut(tree, "")
    return ast.dump(tree), functions


def _added_defaults(
    patch: Patch, qualname: str, old: ast.arguments, new: ast.arguments
) -> tuple[tuple[object, ...], tuple[tuple[str, object], ...]]:
    """Defaults of the parameters that ``new`` has after those of ``old``, positional and
    keyword-only ones. Raises PatchError if anything else differs."""
    num, num_defaults, num_by_keyword = len(old.args), len(old.defaults), len(old.kwonlyargs)
    names = [parameter.arg for parameter in new.args[num:]]
    keywords = [parameter.arg for parameter in new.kwonlyargs[num_by_keyword:]]
    defaults = [*new.defaults[num_defaults:], *new.kw_defaults[num_by_keyword:]]
    rest = ast.arguments(
        new.posonlyargs,
        new.args[:num],
        new.vararg,
        new.kwonlyargs[:num_by_keyword],
        new.kw_defaults[:num_by_keyword],
        new.kwarg,
        new.defaults[:num_defaults],
    )
    if (
        ast.dump(rest) != ast.dump(old)
        or len(defaults) != len(names) + len(keywords)
        or not all(isinstance(default, ast.Constant) for default in defaults)
        or (names and new.vararg)
    ):
        raise patch.error(
            f"it changes the signature of {qualname} by more than new last parameters with a "
            "constant as default",
            _OURS,
        )
    values = [default.value for default in defaults if isinstance(default, ast.Constant)]
    by_keyword = zip(keywords, values[len(names) :], strict=True)
    return tuple(values[: len(names)]), tuple(by_keyword)


def _function_code(patch: Patch, code: CodeType, qualname: str) -> CodeType:
    for name in qualname.split("."):
        inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        if len(inner) != 1:
            raise patch.error(f"{name} of {qualname} is compiled {len(inner)} times", _OURS)
        code = inner[0]
    return code


def _live_function(patch: Patch, module: ModuleType, qualname: str) -> FunctionType:
    """The function that a name currently refers to, without its decorators and hooks."""
    found: Any = module
    try:
        for name in qualname.split("."):
            found = vars(found)[name]
    except (KeyError, TypeError):
        raise patch.error(f"{qualname} is not there under that name", _OTHER) from None
    while True:
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        elif isinstance(found, property):
            found = found.fget
        elif hasattr(found, "__wrapped__"):
            wrapper, found = found, found.__wrapped__
            # HookRegistry's REPLACE sets __wrapped__, but never calls the wrapped function.
            if isinstance(wrapper, FunctionType) and not _closes_over(wrapper, found):
                raise patch.error(f"another plugin replaced {qualname}", _OTHER)
        elif isinstance(found, FunctionType):
            return found
        else:
            raise patch.error(f"{qualname} is a {type(found).__name__}, not a function", _OTHER)


def _closes_over(wrapper: FunctionType, function: object) -> bool:
    for cell in wrapper.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            if cell.cell_contents is function:
                return True
    return False


def _set_code(function: FunctionType, change: _Change) -> None:
    function.__code__ = change.patched
    if change.added:
        function.__defaults__ = (function.__defaults__ or ()) + change.added
    if change.added_by_keyword:
        function.__kwdefaults__ = {
            **(function.__kwdefaults__ or {}),
            **dict(change.added_by_keyword),
        }


def _runs(function: FunctionType, change: _Change) -> bool:
    return _bare(function.__code__) == _bare(change.patched)


def _bare(code: CodeType) -> CodeType:
    """The code without file name and line numbers, for comparison only."""
    constants = tuple(_bare(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=constants)
