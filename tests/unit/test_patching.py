"""Diffs become new code of functions that are already imported; other changes are refused."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import inspect
import itertools
import re
import textwrap
import traceback
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.config import SGLANG_PIN
from sglang_elora.srt.install.patching import (
    Patch,
    PatchError,
    apply_patch,
    is_applied,
    preflight,
)
from tests.harness.diffs import unified

_numbers = itertools.count()


class Target:
    """A module on sys.path, imported before its patch is made."""

    def __init__(self, folder: Path, source: str) -> None:
        self.source = textwrap.dedent(source)
        self.name = f"patch_target_{next(_numbers)}"
        self.path = folder / f"{self.name}.py"
        self.path.write_text(self.source)
        importlib.invalidate_caches()
        self.module: Any = importlib.import_module(self.name)

    def diff(self, after: str) -> str:
        return unified(self.path.name, self.source, after)

    def patch(self, old: str, new: str, name: str = "01-test.patch") -> Patch:
        assert self.source.count(old) == 1, old
        return self.withunified(self.diff(self.source.replace(old, new)), name)

    def withunified(self, diff: str, name: str = "01-test.patch") -> Patch:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return Patch(name, self.path.name, digest, "a test", "# a header\n" + diff)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


SHAPES = {
    "function": ("def f(): return 'old'", "module.f()"),
    "method": ("class C:\n    def f(self): return 'old'", "module.C().f()"),
    "nested class": (
        "class C:\n    class D:\n        def f(self): return 'old'",
        "module.C.D().f()",
    ),
    "static method": ("class C:\n    @staticmethod\n    def f(): return 'old'", "module.C.f()"),
    "class method": (
        "class C:\n    @classmethod\n    def f(cls): return cls.__name__ and 'old'",
        "module.C.f()",
    ),
    "property": ("class C:\n    @property\n    def f(self): return 'old'", "module.C().f"),
    "cached": (
        "import functools\n@functools.lru_cache(1)\ndef f(): return 'old'",
        "module.f.__wrapped__()",
    ),
    "decorated": (
        "import functools\ndef twice(g):\n    @functools.wraps(g)\n"
        "    def both(): return g() and g()\n    return both\n"
        "@twice\n@twice\ndef f(): return 'old'",
        "module.f()",
    ),
    "super": (
        "class B:\n    def f(self): return 'value'\nclass C(B):\n"
        "    def f(self): return (super().f(), __class__.__name__) and 'old'",
        "module.C().f()",
    ),
    "private name": (
        "class C:\n    __word = 'old'\n    def f(self): return self.__word and 'old '.strip()",
        "module.C().f().strip()",
    ),
    "nested function": (
        "def f(word='!'):\n    def inner():\n        return word and 'old'\n    return inner()",
        "module.f()",
    ),
    "generator": ("def f():\n    yield 'old'", "next(module.f())"),
    "coroutine": ("async def f(): return 'old'", "asyncio.run(module.f())"),
    "async generator": ("async def f():\n    yield 'old'", "asyncio.run(anext_of(module.f()))"),
    "conditional definition": ("if True:\n    def f(): return 'old'", "module.f()"),
}


async def _anext_of(generator: Any) -> Any:
    try:
        return await generator.__anext__()
    finally:
        await generator.aclose()


@pytest.mark.parametrize("shape", SHAPES)
def test_imported_function_runs_the_patched_body(shape: str, folder: Path) -> None:
    source, call = SHAPES[shape]
    target = Target(folder, f"{source}\nAFTER = 1\n")
    word, longer = ("'old '", "'new '") if "'old '" in source else ("'old'", "'new'")
    patch = target.patch(word, longer)

    def result() -> object:
        scope = {"module": target.module, "asyncio": asyncio, "anext_of": _anext_of}
        return eval(call, scope)

    assert result() == "old"
    assert preflight(patch) == [] and not is_applied(patch)
    (changed,) = apply_patch(patch)
    assert changed.startswith(f"{target.name}.") and changed.endswith("f")
    assert result() == "new"
    assert is_applied(patch) and preflight(patch) == []


def test_patched_classes_and_functions_keep_their_identity(folder: Path) -> None:
    """Other modules hold the class and the function, instances and bound methods exist."""
    target = Target(folder, "class C:\n    def f(self):\n        return 'old'\n")
    cls, function, instance = target.module.C, target.module.C.f, target.module.C()
    bound = instance.f
    apply_patch(target.patch("'old'", "'new'"))
    assert target.module.C is cls and cls.f is function
    assert bound() == instance.f() == "new"


def test_second_apply_of_a_patch_changes_nothing(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    patch = target.patch("'old'", "'new'")
    assert apply_patch(patch) == (f"{target.name}.f",)
    code = target.module.f.__code__
    assert apply_patch(patch) == ()
    assert target.module.f.__code__ is code


def test_patched_code_is_recognised_after_specialisation(folder: Path) -> None:
    """CPython specialises the instructions of a hot function in place."""
    target = Target(folder, "def f(x=1):\n    return [x + n for n in range(9)], 'old'\n")
    target.module.f.__code__ = target.module.f.__code__.replace(co_firstlineno=99, co_filename="x")
    for _ in range(2000):
        target.module.f()
    patch = target.patch("'old'", "'new'")
    apply_patch(patch)
    for _ in range(2000):
        assert target.module.f()[1] == "new"
    assert is_applied(patch)


def test_two_patches_of_one_file_both_apply(folder: Path) -> None:
    """Each is made against the pinned file. They may not share a function."""
    target = Target(folder, "def f():\n    return 'f'\n\n\ndef g():\n    return 'g'\n")
    first = target.patch("'f'", "'F' + 'F'", "01-f.patch")
    second = target.patch("'g'", "'G'", "02-g.patch")
    third = target.patch("return 'f'", "return None", "03-f.patch")
    apply_patch(first)
    apply_patch(second)
    assert (target.module.f(), target.module.g()) == ("FF", "G")
    assert is_applied(first) and is_applied(second)
    with pytest.raises(PatchError, match="another plugin or patch changed f"):
        apply_patch(third)


def test_patched_module_keeps_its_future_flags(folder: Path) -> None:
    """The target's own ``from __future__`` imports count, not those of patching.py."""
    target = Target(folder, "def f():\n    def g(x: int): ...\n    return g, 'old'\n")
    apply_patch(target.patch("'old'", "'new'"))
    assert target.module.f()[0].__annotations__ == {"x": int}


def test_patch_that_shifts_lines_keeps_later_functions(folder: Path) -> None:
    """A function after the change keeps its code; its tracebacks point at the file on disk."""
    target = Target(folder, "def f():\n    return 'old'\n\n\ndef g():\n    return 1 / 0\n")
    code = target.module.g.__code__
    apply_patch(target.patch("    return 'old'", "    word = 'new'\n    return word"))
    assert target.module.f() == "new"
    assert target.module.g.__code__ is code


def test_tracebacks_and_getsource_show_the_patched_lines(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    apply_patch(target.patch("    return 'old'", "    word = 'new'\n    return word / 0"))
    with pytest.raises(TypeError) as caught:
        target.module.f()
    shown = "".join(traceback.format_exception(caught.value))
    assert (
        f'{target.path} [sglang_elora 01-test.patch]", line 3, in f\n    return word / 0' in shown
    )
    assert "word = 'new'" in inspect.getsource(target.module.f)


BODY = """\
import functools


class C:
    limit = 1

    def f(self, x, y=2):
        z = 3
        return x + y + z

    @property
    def p(self):
        return 'get'

    @p.setter
    def p(self, value):
        self.value = value


def outer(a, b):
    def inner():
        return a
    return inner


inner = outer(1, 2)
double = lambda x: 2 * x
"""

REFUSED = {
    "module level": (
        "import functools",
        "import functools as tools",
        "changes more than functions",
    ),
    "class level": ("limit = 1", "limit = 2", "changes more than functions"),
    "signature": ("(self, x, y=2)", "(self, x, w, y=2)", "the signature of C.f"),
    "default": ("y=2", "y=5", "the signature of C.f"),
    "annotation": ("(self, x,", "(self, x: int,", "the signature of C.f"),
    "new parameter in front": ("x, y=2)", "w=1, x=1, y=2)", "the signature of C.f"),
    "new parameter without default": ("y=2)", "y=2, *, w)", "the signature of C.f"),
    "new default that is computed": ("y=2)", "y=2, w=len(''))", "the signature of C.f"),
    "new parameters by number": ("y=2)", "y=2, *w)", "the signature of C.f"),
    "decorator": (
        "    @property\n",
        "    @functools.cached_property\n",
        "changes more than functions",
    ),
    "module lambda": ("2 * x", "3 * x", "changes more than functions"),
    "new function": ("double =", "def g(): ...\ndouble =", "changes more than functions"),
    "removed function": (
        "    def f(self, x, y=2):\n        z = 3\n        return x + y + z\n",
        "    pass\n",
        "changes more than functions",
    ),
    "made async": ("    def f(", "    async def f(", "changes more than functions"),
    "made a generator": ("return x + y + z", "yield x", "or a generator"),
    "twice defined": ("return 'get'", "return 'got'", "C.p is defined more than once"),
    "new closure": ("z = 3", "z = __class__ and 3", "what C.f closes over"),
    "comment only": ("z = 3", "z = 3  # three", "changes no function"),
    "syntax": ("z = 3", "z = = 3", "does not compile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patch_of_unpatchable_constructs_is_refused(case: str, folder: Path) -> None:
    old, new, reason = REFUSED[case]
    target = Target(folder, BODY)
    code = target.module.C.f.__code__
    patch = target.patch(old, new)
    (problem,) = preflight(patch)
    assert re.search(reason, problem), problem
    for part in (patch.name, patch.target, f"sglang=={SGLANG_PIN}", "patches/README.md"):
        assert part in problem
    with pytest.raises(PatchError, match=reason):
        apply_patch(patch)
    assert not is_applied(patch)
    assert target.module.C.f.__code__ is code


ADDED = """\
def f(x, y=2):
    return x, y


def g(x, *rest, y=2):
    return x, rest, y


class C:
    def h(self):
        return None
"""


def test_added_trailing_parameters_get_their_defaults(folder: Path) -> None:
    target = Target(folder, ADDED)
    f, g, h = target.module.f, target.module.g, target.module.C.h
    after = (
        ADDED.replace(
            "y=2):\n    return x, y", "y=2, z: int = 3, *, w=None):\n    return x, y, z, w"
        )
        .replace(
            "*rest, y=2):\n    return x, rest, y", "*rest, y=2, z='z'):\n    return x, rest, y, z"
        )
        .replace("self):\n        return None", "self, z=None):\n        return z")
    )
    patch = target.withunified(target.diff(after))
    assert preflight(patch) == [] and not is_applied(patch)
    assert len(apply_patch(patch)) == 3
    assert apply_patch(patch) == () and is_applied(patch) and preflight(patch) == []
    assert (f(1), f(1, 5, w=6), f(1, z=4)) == ((1, 2, 3, None), (1, 5, 3, 6), (1, 2, 4, None))
    assert (g(1, 7), g(1, z=4, y=5)) == ((1, (7,), 2, "z"), (1, (), 5, 4))
    assert h(target.module.C(), 8) == target.module.C().h(z=8) == 8
    assert list(inspect.signature(f).parameters) == ["x", "y", "z", "w"]


def test_positional_parameter_added_before_args_is_refused(folder: Path) -> None:
    target = Target(folder, ADDED)
    (problem,) = preflight(target.patch("(x, *rest", "(x, z=1, *rest"))
    assert "the signature of g" in problem


def test_patched_inner_function_may_close_over_more_variables(folder: Path) -> None:
    """Only the outermost function's closure exists already; inner ones are made at each call."""
    target = Target(folder, BODY)
    apply_patch(target.patch("        return a\n", "        return a, b\n"))
    assert target.module.outer(1, 2)() == (1, 2)
    assert target.module.inner() == 1  # made before the patch


def test_patch_applies_to_all_functions_or_none(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n\n\ndef g():\n    return 'old'\n")
    patch = target.withunified(target.diff(target.source.replace("'old'", "'new'")))
    target.module.g = lambda: "theirs"
    with pytest.raises(PatchError, match="another plugin or patch changed g"):
        apply_patch(patch)
    assert target.module.f() == "old"


def _replace_hook(function: Any) -> Any:
    """As HookRegistry does for REPLACE: __wrapped__ is kept, the original never called."""

    def hook() -> str:
        return "theirs"

    @functools.wraps(function)
    def wrapper() -> str:
        return hook()

    return wrapper


MEDDLING = (
    "module.f = lambda: 'theirs'",
    "module.f.__code__ = (lambda: 'theirs').__code__",
    "module.f = replace_hook(module.f)",
    "module.f = len",
    "del module.f",
)


@pytest.mark.parametrize("meddling", MEDDLING)
@pytest.mark.parametrize("applied_first", [False, True])
def test_function_replaced_by_another_plugin_is_refused(
    meddling: str, applied_first: bool, folder: Path
) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    patch = target.patch("'old'", "'new'")
    if applied_first:
        apply_patch(patch)
    exec(meddling, {"module": target.module, "replace_hook": _replace_hook})
    (problem,) = preflight(patch)
    assert re.search(r"\bf\b.* Remove the plugin", problem), problem
    assert not is_applied(patch)
    with pytest.raises(PatchError):
        apply_patch(patch)


def test_method_of_a_replaced_class_is_refused(folder: Path) -> None:
    target = Target(folder, "class C:\n    def f(self):\n        return 'old'\n")
    patch = target.patch("'old'", "'new'")
    target.module.C = type("C", (target.module.C,), {})
    assert "C.f is not there" in preflight(patch)[0]


def test_wrapper_hooks_of_other_plugins_stay_in_place(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    original = target.module.f

    @functools.wraps(original)
    def wrapper() -> str:
        return f"<{original()}>"

    target.module.f = wrapper
    patch = target.patch("'old'", "'new'")
    apply_patch(patch)
    assert target.module.f is wrapper and wrapper() == "<new>"
    assert is_applied(patch)


# The file and the diff.


def test_patch_of_a_changed_file_is_refused(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    patch = target.patch("'old'", "'new'")
    target.path.write_text(target.source + "\n")
    (problem,) = preflight(patch)
    assert str(target.path) in problem and patch.sha256 in problem
    assert problem.endswith(f"Install sglang=={SGLANG_PIN} unmodified.")
    assert not is_applied(patch)


def test_patch_of_an_absent_module_is_refused() -> None:
    (problem,) = preflight(Patch("01-test.patch", "patch_target_absent/x.py", "0", "a test", ""))
    assert "cannot be imported and read" in problem
