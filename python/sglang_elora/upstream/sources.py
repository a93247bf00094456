"""Names, classes and members of Python sources, from syntax trees. Nothing is imported."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

Function = ast.FunctionDef | ast.AsyncFunctionDef

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_FIELDS = "sglang/srt/arg_groups/fields/"
"""Folder of the classes from which SGLang assembles the fields of ``ServerArgs``."""


class Files:
    """The Python files of a wheel, or of a folder that contains packages."""

    def __init__(self, path: Path) -> None:
        self._texts: dict[str, str] = {}
        if path.is_dir():
            self._folder: Path | None = path
        else:
            self._folder = None
            if path.is_file() and not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile(f"{path} is not a wheel")
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if name.endswith(".py"):
                        self._texts[name] = wheel.read(name).decode()

    def read(self, name: str) -> str | None:
        """The text of a file by its path, with slashes; None if there is none."""
        if name not in self._texts and self._folder is not None:
            path = self._folder / name
            if not path.is_file():
                return None
            self._texts[name] = path.read_text()
        return self._texts.get(name)

    def below(self, prefix: str) -> Iterator[str]:
        """Paths of the files that start with ``prefix``."""
        if self._folder is None:
            yield from (name for name in self._texts if name.startswith(prefix))
            return
        for path in sorted((self._folder / prefix).rglob("*.py")):
            yield str(PurePosixPath(path.relative_to(self._folder)))


@dataclass(frozen=True)
class Definition:
    """All definitions of a dotted name (for example one per branch of an ``if``).

    ``owner`` is its class if it is a member; a module has no nodes.
    """

    module: Module
    name: str  # dotted, where it is defined
    nodes: tuple[ast.AST, ...] = ()
    owner: Class | None = None

    @property
    def as_class(self) -> Class | None:
        node = self.nodes[0] if self.nodes else None
        return self.module.class_of(node) if isinstance(node, ast.ClassDef) else None


class Module:
    """One file, with its top-level definitions and imports."""

    def __init__(self, sources: Sources, name: str, file: str, text: str) -> None:
        self.sources, self.name, self.file = sources, name, file
        self.tree = ast.parse(text)
        self.is_package = file.endswith("/__init__.py")
        self.definitions: dict[str, list[ast.AST]] = {}
        self.imports: dict[str, str] = {}  # local name -> dotted name
        self.stars: list[str] = []  # modules imported with *
        self._classes: dict[ast.ClassDef, Class] = {}
        self._read(self.tree.body)

    def class_of(self, node: ast.ClassDef) -> Class:
        if node not in self._classes:
            self._classes[node] = Class(self, node)
        return self._classes[node]

    def _read(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._read_import(node)
            elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                self.definitions.setdefault(node.name, []).append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in assigned(node):
                    if isinstance(target, ast.Name):
                        self.definitions.setdefault(target.id, []).append(node)
            for field in ("body", "orelse", "finalbody", "handlers"):
                if isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
                    for inner in getattr(node, field, []):
                        self._read(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for name, dotted in imported(node, self.name, self.is_package):
            if name == "*":
                self.stars.append(dotted)
            else:
                self.imports.setdefault(name, dotted)

    def resolve(self, dotted: str) -> Definition | None:
        """The definition that a dotted name has in this file."""
        first, _, rest = dotted.partition(".")
        if first in self.definitions:
            return self.sources.resolve(f"{self.name}.{dotted}")
        known = self.imports.get(first)
        if known is not None:
            return self.sources.resolve(f"{known}.{rest}" if rest else known)
        for star in self.stars:
            found = self.sources.resolve(f"{star}.{dotted}")
            if found is not None:
                return found
        return None


class Class:
    """A class, with the members that its body and its methods define."""

    def __init__(self, module: Module, node: ast.ClassDef) -> None:
        self.module, self.node = module, node
        self.name = f"{module.name}.{node.name}"

    @cached_property
    def own(self) -> dict[str, tuple[ast.AST, ...]]:
        found: dict[str, list[ast.AST]] = {}
        for node in self.node.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.setdefault(node.name, []).append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in assigned(node):
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, []).append(node)
        for node in self.node.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for name in _set_on_self(node):
                    found.setdefault(name, [])
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def bases(self) -> list[Class]:
        """Direct base classes whose source is available."""
        found = [self.module.resolve(ast.unparse(base)) for base in self.node.bases]
        return [each.as_class for each in found if each is not None and each.as_class is not None]

    def lineage(self) -> Iterator[Class]:
        """The class and all its base classes, depth first."""
        yield self
        for base in self.bases:
            yield from base.lineage()

    def find(self, name: str) -> Definition | None:
        """A member of the class, or of its first base class that has it."""
        for each in self.lineage():
            if name in each.own:
                return Definition(each.module, f"{each.name}.{name}", each.own[name], each)
        if self.name == SERVER_ARGS:
            return self.module.sources.server_field(name)
        return None


class Sources:
    """Packages whose definitions are looked up by dotted names.

    Args:
        packages: Files by top-level package, for example ``{"sglang": Files(wheel)}``.
    """

    def __init__(self, packages: Mapping[str, Files]) -> None:
        self.packages = packages
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = None  # while it is being read
            files = self.packages.get(name.partition(".")[0])
            path = name.replace(".", "/")
            for file in (f"{path}.py", f"{path}/__init__.py"):
                text = files.read(file) if files is not None else None
                if text is not None:
                    self._modules[name] = Module(self, name, file, text)
                    break
        return self._modules[name]

    def modules_of(self, package: str, below: str = "") -> Iterator[Module]:
        for file in self.packages[package].below(f"{package}/{below}"):
            name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            module = self.module(name)
            if module is not None:
                yield module

    def resolve(self, dotted: str) -> Definition | None:
        parts = dotted.split(".")
        for split in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:split]))
            if module is None:
                continue
            rest = parts[split:]
            if not rest:
                return Definition(module, module.name)
            nodes = tuple(module.definitions.get(rest[0], ()))
            if not nodes:
                known = module.imports.get(rest[0])
                if known is not None and known != ".".join(parts[: split + 1]):
                    return self.resolve(".".join([known, *rest[1:]]))
                known_stars = filter(self.module, module.stars)
                stars = (self.resolve(".".join([star, *rest])) for star in known_stars)
                return next((found for found in stars if found is not None), None)
            found = Definition(module, ".".join(parts[: split + 1]), nodes)
            if len(rest) == 1:
                return found
            return found.as_class.find(rest[1]) if found.as_class is not None else None
        return None

    def server_field(self, name: str) -> Definition | None:
        """A field of ``ServerArgs``, which SGLang assembles at run time."""
        for each in self._field_classes():
            if name in each.own:
                return Definition(each.module, f"{SERVER_ARGS}.{name}", each.own[name], each)
        return None

    def server_fields(self) -> dict[str, str]:
        """Names of all fields of ``ServerArgs``, with empty values."""
        return {name: "" for each in self._field_classes() for name in each.own}

    def _field_classes(self) -> Iterator[Class]:
        for module in self.modules_of("sglang", _FIELDS.removeprefix("sglang/")):
            for nodes in module.definitions.values():
                each = Definition(module, module.name, tuple(nodes)).as_class
                if each is not None:
                    yield each


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    """The targets of an assignment."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if isinstance(target, (ast.Tuple, ast.List)):
            yield from target.elts
        elif target is not None:
            yield target


def imported(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool
) -> Iterator[tuple[str, str]]:
    """(local name, dotted name) of each name that an import defines."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            yield name, alias.name if alias.asname else name
        return
    package = module.split(".")
    package = package[: len(package) - node.level + is_package] if node.level else []
    base = ".".join([*package, *([node.module] if node.module else [])])
    for alias in node.names:
        if alias.name == "*":
            yield "*", base
        else:
            yield alias.asname or alias.name, f"{base}.{alias.name}"


def _set_on_self(method: Function) -> Iterator[str]:
    if not method.args.args:
        return
    own = method.args.args[0].arg
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == own
        ):
            yield node.attr
