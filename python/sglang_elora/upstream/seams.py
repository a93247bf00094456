"""Search of this package's sources for the places in SGLang that they rely on ("seams").

A name whose class is known from an import, a base class, an annotation or a hook's target is
looked up in that class; any other attribute is known by its name only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import product

from sglang_elora.upstream.sources import (
    SERVER_ARGS,
    Class,
    Definition,
    Files,
    Function,
    Module,
    Sources,
    imported,
)

OURS = "sglang_elora"
WORDS = ("extra_key", "load_plugins")
"""Names of plain values that SGLang passes on; changes in where it uses them are reported."""
_SERVER_ARGS_NAMES = {"server_args", "cfg"}


class Kind(Enum):
    """The way in which this package relies on a place."""

    HOOK = "hooked"
    PATCH = "patched file"
    OVERRIDE = "overridden"
    ADDED = "added to a class of SGLang"
    BASE = "subclassed"
    CALL = "called"
    IMPORT = "imported"
    MEMBER = "used"
    FIELD = "configuration field"
    NAME = "used, of a class that is not known"
    WORD = "word"


@dataclass(frozen=True)
class Seam:
    """One place in SGLang, and where our sources rely on it."""

    kind: Kind
    name: str  # dotted name in SGLang; for NAME the attribute, for PATCH the file
    used_in: str = field(compare=False)
    detail: str = ""  # a hook's leading parameters; the overridden members of a base


def find_seams(
    sources: Sources, patches: Mapping[str, str], scripts: Mapping[str, str] | None = None
) -> list[Seam]:
    """All places that our sources rely on.

    Args:
        sources: Sources of the pinned ``sglang`` and of ``sglang_elora``.
        patches: Texts of the patches, by name.
        scripts: Texts of other files, by path, of which only imports count.
    """
    found: dict[Seam, None] = {}
    modules = [m for m in sources.modules_of(OURS) if not _is_about_itself(m)]
    bodies: dict[int, Class] = {}  # id of a hook body's node -> class of its ``self``
    for module in modules:
        for seam, body in _hooks(module, sources):
            found[seam] = None
            owner = sources.resolve(seam.name)
            node = body.nodes[0] if body is not None and body.nodes else None
            if node is not None and owner is not None and owner.owner is not None:
                bodies[id(node)] = owner.owner
    for module in modules:
        found.update(dict.fromkeys(_Reader(module, sources, bodies).seams()))
    for file, text in (scripts or {}).items():
        script = Module(sources, "script", file, text)
        found.update(dict.fromkeys(_Reader(script, sources, bodies).imports()))
    hooked = {seam.name for seam in found if seam.kind is Kind.HOOK}
    found = {s: None for s in found if s.kind is not Kind.IMPORT or s.name not in hooked}
    for name, text in patches.items():
        target = re.search(r"^# target: (.*)$", text, re.MULTILINE)
        assert target is not None, name
        found[Seam(Kind.PATCH, target[1], name)] = None
    found[Seam(Kind.FIELD, SERVER_ARGS, "docs/compatibility.md")] = None
    for word in WORDS:
        found[Seam(Kind.WORD, word, "patches/README.md")] = None
    return list(found)


def _is_about_itself(module: Module) -> bool:
    return module.name.startswith(f"{OURS}.upstream")


def _hooks(module: Module, sources: Sources) -> Iterator[tuple[Seam, Definition | None]]:
    """(place, body) of each row in the tables of hooks, including rows of comprehensions."""
    rows: list[tuple[ast.Call, list[ast.comprehension]]] = []

    def visit(node: ast.AST, loops: list[ast.comprehension]) -> None:
        if isinstance(node, ast.GeneratorExp):
            loops = [*loops, *node.generators]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Hook":
            rows.append((node, loops))
        for child in ast.iter_child_nodes(node):
            visit(child, loops)

    visit(module.tree, [])
    for call, loops in rows:
        for values in _rounds(loops):
            target = _text(call.args[0], values)
            if target is None:
                continue
            parameters = " ".join(ast.literal_eval(call.args[1]))
            body = values.get(ast.unparse(call.args[3]), call.args[3])
            assert isinstance(body, ast.expr)
            used_in = f"{module.file}:{call.lineno}"
            seam = Seam(Kind.HOOK, target, used_in, parameters)
            yield seam, module.resolve(ast.unparse(body))


def _rounds(loops: list[ast.comprehension]) -> Iterator[dict[str, ast.expr]]:
    """The expressions that a comprehension's names have in each iteration."""
    choices = []
    for loop in loops:
        if not isinstance(loop.iter, (ast.Tuple, ast.List)):
            return
        choices.append([_named(loop.target, value) for value in loop.iter.elts])
    for combination in product(*choices):
        yield {name: value for names in combination for name, value in names.items()}


def _named(target: ast.expr, value: ast.expr) -> dict[str, ast.expr]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return {ast.unparse(t): v for t, v in zip(target.elts, value.elts, strict=True)}
    return {ast.unparse(target): value}


def _text(node: ast.expr, values: Mapping[str, ast.expr]) -> str | None:
    """The run-time value of a string expression, or None if it is not known statically."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, values)
    if isinstance(node, ast.Name) and node.id in values:
        return _text(values[node.id], {})
    if isinstance(node, ast.JoinedStr):
        parts = [_text(value, values) for value in node.values]
        return None if None in parts else "".join(filter(None, parts))
    return None


class _Reader:
    """Finds the places that one of our files relies on."""

    def __init__(self, module: Module, sources: Sources, bodies: Mapping[int, Class]) -> None:
        self.module, self.sources, self.bodies = module, sources, bodies
        self._local: dict[str, str] = dict(module.imports)

    def seams(self) -> Iterator[Seam]:
        yield from self.imports()
        yield from self._read(self.module.tree, {})

    def imports(self) -> Iterator[Seam]:
        """Places that the file imports, anywhere in it, or names in a string."""
        for node in ast.walk(self.module.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name, dotted in imported(node, self.module.name, self.module.is_package):
                    self._local.setdefault(name, dotted)
                    if dotted.startswith("sglang."):
                        yield self._seam(Kind.IMPORT, dotted, node)
            elif isinstance(node, ast.Constant) and _is_dotted(node.value):
                if self.sources.resolve(str(node.value)) is not None:
                    yield self._seam(Kind.IMPORT, str(node.value), node)

    def _read(self, node: ast.AST, known: Mapping[str, Class]) -> Iterator[Seam]:
        """Places used in one node; ``known`` are the classes of its variables."""
        if isinstance(node, ast.ClassDef):
            yield from self._subclass(self.module.class_of(node))
        for child in ast.iter_child_nodes(node):
            inner = known
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                own = self.module.class_of(node) if isinstance(node, ast.ClassDef) else None
                inner = {**known, **self._parameters(child, own)}
            if isinstance(child, ast.Attribute):
                yield from self._attribute(child, known)
            elif isinstance(child, ast.Call):
                yield from self._call(child)
            yield from self._read(child, inner)

    def _subclass(self, ours: Class) -> Iterator[Seam]:
        base = next((each for each in ours.lineage() if each.name.startswith("sglang.")), None)
        if base is None:
            return
        overridden = []
        for name, nodes in ours.own.items():
            above = base.find(name)
            if above is None:
                yield self._seam(
                    Kind.ADDED, f"{base.name}.{name}", nodes[0] if nodes else ours.node
                )
            elif nodes:
                overridden.append(name)
                yield self._seam(Kind.OVERRIDE, above.name, nodes[0])
        if base in ours.bases:
            yield self._seam(Kind.BASE, base.name, ours.node, " ".join(sorted(overridden)))

    def _parameters(self, function: Function | ast.Lambda, owner: Class | None) -> dict[str, Class]:
        found: dict[str, Class] = {}
        arguments = function.args
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if each.annotation is not None:
                of_class = self._annotated(each.annotation)
                if of_class is not None:
                    found[each.arg] = of_class
            elif owner is not None and each.arg == "self":
                found["self"] = owner
            if each.arg in _SERVER_ARGS_NAMES:
                server_args = self.sources.resolve(SERVER_ARGS)
                if server_args is not None and server_args.as_class is not None:
                    found[each.arg] = server_args.as_class
        hooked = self.bodies.get(id(function))
        if hooked is not None and any(each.arg == "self" for each in arguments.args):
            found["self"] = hooked
        return found

    def _annotated(self, annotation: ast.expr) -> Class | None:
        text = ast.unparse(annotation).strip("'\"").removesuffix(" | None")
        found = self._resolve(text) if re.fullmatch(r"[\w.]+", text) else None
        return found.as_class if found is not None else None

    def _resolve(self, dotted: str) -> Definition | None:
        first, _, rest = dotted.partition(".")
        known = self._local.get(first)
        if known is not None:
            return self.sources.resolve(f"{known}.{rest}" if rest else known)
        return self.module.resolve(dotted)

    def _attribute(self, node: ast.Attribute, known: Mapping[str, Class]) -> Iterator[Seam]:
        name = node.value.id if isinstance(node.value, ast.Name) else None
        is_super = ast.unparse(node.value) == "super()"
        of_class = known.get("self" if is_super else name or "")
        if of_class is not None:
            found = _upstream(of_class, node.attr, not is_super)
            if found is not None:
                kind = Kind.FIELD if found.name.startswith(SERVER_ARGS) else Kind.MEMBER
                yield self._seam(kind, found.name, node)
            return
        dotted = ast.unparse(node)
        first = dotted.partition(".")[0]
        if re.fullmatch(r"[\w.]+", dotted) and self._local.get(first, "").startswith("sglang"):
            found = self._resolve(dotted)
            if found is not None and found.module.name.startswith("sglang."):
                yield self._seam(Kind.IMPORT, f"{self._local[first]}{dotted[len(first) :]}", node)
            return
        if self.module.name.startswith((f"{OURS}.host", f"{OURS}.platforms")):
            yield self._seam(Kind.NAME, node.attr, node)

    def _call(self, node: ast.Call) -> Iterator[Seam]:
        dotted = ast.unparse(node.func)
        if re.fullmatch(r"[\w.]+", dotted):
            first = dotted.partition(".")[0]
            known = self._local.get(first, "")
            if known.startswith("sglang.") and self._resolve(dotted) is not None:
                yield self._seam(Kind.CALL, f"{known}{dotted[len(first) :]}", node)

    def _seam(self, kind: Kind, name: str, node: ast.AST, detail: str = "") -> Seam:
        return Seam(kind, name, f"{self.module.file}:{getattr(node, 'lineno', 1)}", detail)


def _upstream(ours: Class, name: str, with_own: bool = False) -> Definition | None:
    """The member in the nearest SGLang base class of ``ours``. With ``with_own``, None if one of
    our classes defines it first."""
    for each in ours.lineage():
        if each.name.startswith("sglang."):
            return each.find(name)
        if with_own and each.own.get(name):
            return None
    return None


def _is_dotted(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"sglang(\.\w+){2,}", value))


def member_names(files: Files, below: str) -> set[str]:
    """A superset of the names of all members of classes: a name outside it is not defined."""
    found: set[str] = set()
    for file in files.below(below):
        text = files.read(file) or ""
        for pattern in (r"def (\w+)", r"self\.(\w+)", r"(?m)^ *(\w+) *[:=]"):
            found.update(re.findall(pattern, text))
    return found
