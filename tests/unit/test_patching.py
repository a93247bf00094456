"""Diffs become new code of functions that are already imported; everything else is refused."""

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
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.config import SGLANG_PIN
from sglang_elora.host.patching import (
    Patch,
    PatchError,
    apply_patch,
    is_applied,
    load_patches,
    patched_source,
    preflight,
)

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
        return _diff(self.path.name, self.source, after)

    def patch(self, old: str, new: str, name: str = "01-test.patch") -> Patch:
        assert self.source.count(old) == 1, old
        return self.with_diff(self.diff(self.source.replace(old, new)), name)

    def with_diff(self, diff: str, name: str = "01-test.patch") -> Patch:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return Patch(name, self.path.name, digest, "a test", "# a header\n" + diff)


def _diff(target: str, before: str, after: str) -> str:
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(unified_diff(*lines, f"a/{target}", f"b/{target}"))


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
def test_a_live_function_runs_the_patched_body(shape: str, folder: Path) -> None:
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


def test_identity_survives(folder: Path) -> None:
    """Other modules hold the class and the function, instances and bound methods exist."""
    target = Target(folder, "class C:\n    def f(self):\n        return 'old'\n")
    cls, function, instance = target.module.C, target.module.C.f, target.module.C()
    bound = instance.f
    apply_patch(target.patch("'old'", "'new'"))
    assert target.module.C is cls and cls.f is function
    assert bound() == instance.f() == "new"


def test_a_second_apply_changes_nothing(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    patch = target.patch("'old'", "'new'")
    assert apply_patch(patch) == (f"{target.name}.f",)
    code = target.module.f.__code__
    assert apply_patch(patch) == ()
    assert target.module.f.__code__ is code


def test_code_is_known_wherever_it_was_compiled_and_however_often_it_ran(folder: Path) -> None:
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


def test_two_patches_of_one_file(folder: Path) -> None:
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


def test_the_patched_module_keeps_its_future_flags(folder: Path) -> None:
    """The target's own ``from __future__`` imports count, not those of patching.py."""
    target = Target(folder, "def f():\n    def g(x: int): ...\n    return g, 'old'\n")
    apply_patch(target.patch("'old'", "'new'"))
    assert target.module.f()[0].__annotations__ == {"x": int}


def test_lines_may_shift(folder: Path) -> None:
    """A function behind the change keeps its code; its tracebacks point at the file on disk."""
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
def test_what_code_objects_cannot_change_is_refused(case: str, folder: Path) -> None:
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


def test_new_last_parameters_have_their_defaults(folder: Path) -> None:
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
    patch = target.with_diff(target.diff(after))
    assert preflight(patch) == [] and not is_applied(patch)
    assert len(apply_patch(patch)) == 3
    assert apply_patch(patch) == () and is_applied(patch) and preflight(patch) == []
    assert (f(1), f(1, 5, w=6), f(1, z=4)) == ((1, 2, 3, None), (1, 5, 3, 6), (1, 2, 4, None))
    assert (g(1, 7), g(1, z=4, y=5)) == ((1, (7,), 2, "z"), (1, (), 5, 4))
    assert h(target.module.C(), 8) == target.module.C().h(z=8) == 8
    assert list(inspect.signature(f).parameters) == ["x", "y", "z", "w"]


def test_positional_parameters_do_not_go_in_front_of_a_rest(folder: Path) -> None:
    target = Target(folder, ADDED)
    (problem,) = preflight(target.patch("(x, *rest", "(x, z=1, *rest"))
    assert "the signature of g" in problem


def test_an_inner_function_may_close_over_more(folder: Path) -> None:
    """Only the outermost function's closure exists already; inner ones are made at each call."""
    target = Target(folder, BODY)
    apply_patch(target.patch("        return a\n", "        return a, b\n"))
    assert target.module.outer(1, 2)() == (1, 2)
    assert target.module.inner() == 1  # made before the patch


def test_all_functions_or_none(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n\n\ndef g():\n    return 'old'\n")
    patch = target.with_diff(target.diff(target.source.replace("'old'", "'new'")))
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
def test_a_function_that_another_plugin_replaced_is_refused(
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


def test_a_method_of_a_replaced_class_is_refused(folder: Path) -> None:
    target = Target(folder, "class C:\n    def f(self):\n        return 'old'\n")
    patch = target.patch("'old'", "'new'")
    target.module.C = type("C", (target.module.C,), {})
    assert "C.f is not there" in preflight(patch)[0]


def test_wrapping_hooks_of_others_stay_in_place(folder: Path) -> None:
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


def test_another_file_is_refused(folder: Path) -> None:
    target = Target(folder, "def f():\n    return 'old'\n")
    patch = target.patch("'old'", "'new'")
    target.path.write_text(target.source + "\n")
    (problem,) = preflight(patch)
    assert str(target.path) in problem and patch.sha256 in problem
    assert problem.endswith(f"Install sglang=={SGLANG_PIN} unmodified.")
    assert not is_applied(patch)


def test_an_absent_module_is_refused() -> None:
    (problem,) = preflight(Patch("01-test.patch", "patch_target_absent/x.py", "0", "a test", ""))
    assert "cannot be imported and read" in problem


NUMBERED = "".join(f"line {n}\n" for n in range(1, 31))


def _edit(*changes: tuple[str, str]) -> Patch:
    after = NUMBERED
    for old, new in changes:
        after = after.replace(old, new)
    return Patch("01-test.patch", "t.py", "", "", "\n" + _diff("t.py", NUMBERED, after))


def test_hunks_apply_in_order() -> None:
    patch = _edit(("line 3\n", ""), ("line 20\n", "line 20\nnew\n"), ("line 30\n", "end\n"))
    after = patched_source(patch, NUMBERED).splitlines()
    assert "line 3" not in after and after[19] == "new" and after[-1] == "end"
    assert len(after) == 30


@pytest.mark.parametrize("number", [17, 18, 19, 20, 21, 22, 23])
def test_every_context_line_counts(number: int) -> None:
    source = NUMBERED.replace(f"line {number}\n", f"line {number} \n")
    with pytest.raises(PatchError, match=f"line {number} of the target is not 'line {number}'"):
        patched_source(_edit(("line 20\n", "new\n")), source)


def test_lines_elsewhere_do_not() -> None:
    """Their part is the hash."""
    patch = _edit(("line 20\n", "new\n"))
    assert "other" in patched_source(patch, NUMBERED.replace("line 2\n", "other\n"))


def test_no_offset() -> None:
    with pytest.raises(PatchError, match="line 17 of the target is not 'line 17'"):
        patched_source(_edit(("line 20\n", "new\n")), "one more\n" + NUMBERED)


def test_a_target_that_ends_early() -> None:
    with pytest.raises(PatchError, match="line 3 of the target"):
        patched_source(_edit(("line 1\n", "new\n")), "line 1\nline 2")


MALFORMED = {
    "other path": (lambda d: d.replace("a/t.py", "a/u.py"), "no hunks behind"),
    "no hunk": (lambda d: d.partition("@@")[0], "no hunks behind"),
    "count": (lambda d: d.replace("-2,7", "-2,8"), "other line counts"),
    "cut short": (lambda d: d.rpartition(" line 23")[0], "other line counts"),
    "new line number": (lambda d: d.replace("+17,", "+18,"), "out of place"),
    "order": (lambda d: re.sub(r"(?s)(@@ -2.*)(@@ -17.*)", r"\2\1", d), "out of place"),
    "line zero": (lambda d: d.replace("@@ -2,7 +2,7", "@@ -0,7 +0,7"), "out of place"),
    "stray line": (lambda d: d.replace(" line 4\n", "line 4\n"), "not of a unified diff"),
    "no newline": (lambda d: d + "\\ No newline at end of file\n", "not of a unified diff"),
    "header": (lambda d: d.replace("@@ -2,7 ", "@@ 2 "), "not of a unified diff"),
    "second file": (lambda d: d + "--- a/u.py\n+++ b/u.py\n", "other line counts"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_diffs_are_refused(case: str) -> None:
    change, reason = MALFORMED[case]
    good = _edit(("line 5\n", "five\n"), ("line 20\n", "twenty\n"))
    assert change(good.diff) != good.diff
    bad = Patch(good.name, good.target, "", "", change(good.diff))
    with pytest.raises(PatchError, match=reason):
        patched_source(bad, NUMBERED)


def test_no_context_at_all_is_refused() -> None:
    diff = "\n--- a/t.py\n+++ b/t.py\n@@ -3,0 +4,1 @@\n+new\n"
    with pytest.raises(PatchError, match="no context"):
        patched_source(Patch("01-test.patch", "t.py", "", "", diff), NUMBERED)


def test_an_editor_may_have_stripped_blank_context_lines() -> None:
    before, after = "a\n\nb\n", "a\n\nc\n"
    diff = _diff("t.py", before, after).replace("\n \n", "\n\n")
    assert patched_source(Patch("01.patch", "t.py", "", "", "\n" + diff), before) == after


_texts = st.lists(
    st.sampled_from(["a", "b", " ", "", "@@ -1 +1 @@", "-- a/t.py", "++"]), min_size=1
)


@given(_texts, _texts)
def test_every_diff_leads_from_one_text_to_the_other(old: list[str], new: list[str]) -> None:
    before, after = ("".join(f"{line}\n" for line in lines) for lines in (old, new))
    if before != after:
        patch = Patch("01.patch", "t.py", "", "", "\n" + _diff("t.py", before, after))
        assert patched_source(patch, before) == after


# The folder.

HEADER = "# target: a/b.py\n# sha256: 12ab\n# why: Because.\n"


def test_load_patches_in_order_of_names(tmp_path: Path) -> None:
    for name in ("02-b.patch", "01-a.patch", "README.md", "__init__.py"):
        (tmp_path / name).write_text(f"{HEADER}--- a/a/b.py\n+++ b/a/b.py\n")
    patches = load_patches(tmp_path)
    assert [patch.name for patch in patches] == ["01-a.patch", "02-b.patch"]
    (first, _) = patches
    assert (first.target, first.sha256, first.why) == ("a/b.py", "12ab", "Because.")
    assert first.when == "--elora"
    assert first.module == "a.b"


def test_a_header_line_may_say_when(tmp_path: Path) -> None:
    header = f"{HEADER}# when: sglang_elora.lang\n"
    (tmp_path / "01-a.patch").write_text(f"{header}--- a/a/b.py\n+++ b/a/b.py\n")
    assert [patch.when for patch in load_patches(tmp_path)] == ["sglang_elora.lang"]


@pytest.mark.parametrize("field", ["target", "sha256", "why"])
def test_a_missing_header_line_is_named(field: str, tmp_path: Path) -> None:
    header = "".join(line for line in HEADER.splitlines(True) if field not in line)
    (tmp_path / "01-a.patch").write_text(f"{header}--- a/a/b.py\n+++ b/a/b.py\n# {field}: late\n")
    with pytest.raises(PatchError, match=rf"01-a\.patch .*'{field}'"):
        load_patches(tmp_path)


def test_an_empty_folder_is_an_installation_without_its_data(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="install sglang_elora again"):
        load_patches(tmp_path)


def test_a_package_is_a_target_by_its_init_file() -> None:
    assert Patch("01.patch", "a/b/__init__.py", "", "", "").module == "a.b"
