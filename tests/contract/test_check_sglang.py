"""``sglang-elora check-sglang`` finds every use of SGLang, and every change to it."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_elora.upstream.comparison import Verdict, compare, patch_fits
from sglang_elora.upstream.seams import OURS, Kind, Seam, find_seams
from sglang_elora.upstream.sources import SERVER_ARGS, Files, Sources
from tests.harness.programs import source
from tests.harness.run_python import RunPython

ROOT = Path(__file__).parents[2]
PATCHES = {path.name: path.read_text() for path in (ROOT / "patches").glob("*.patch")}
BY_CLASS = (Kind.HOOK, Kind.OVERRIDE, Kind.BASE, Kind.CALL, Kind.IMPORT, Kind.MEMBER, Kind.FIELD)
OVERRIDES = "sglang.srt.managers.multi_tokenizer_mixin.TokenizerWorker."
"""Methods that are still there, as the base class's, when they have been renamed."""


class Edited(Files):
    """A package in which one file has another text, or is missing."""

    def __init__(self, package: Files, name: str, text: str | None) -> None:
        self.package, self.name, self.text = package, name, text

    def read(self, name: str) -> str | None:
        return self.text if name == self.name else self.package.read(name)

    def below(self, prefix: str) -> Iterator[str]:
        return self.package.below(prefix)


@pytest.fixture(scope="module")
def sglang() -> Files:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Files(Path(spec.origin).parents[1])


@pytest.fixture(scope="module")
def ours() -> Files:
    return Files(ROOT / "python")


@pytest.fixture(scope="module")
def pinned(sglang: Files, ours: Files) -> Sources:
    return Sources({"sglang": sglang, OURS: ours})


@pytest.fixture(scope="module")
def seams(pinned: Sources) -> list[Seam]:
    return find_seams(pinned, PATCHES)


def test_check_sglang_finds_no_difference_for_the_pinned_version(
    seams: list[Seam], pinned: Sources
) -> None:
    findings = compare(seams, pinned, pinned, PATCHES)
    assert {finding.verdict for finding in findings} == {Verdict.SAME}
    assert {finding.seam.kind for finding in findings} == set(Kind)


def test_check_sglang_lists_every_row_of_the_hook_tables(
    seams: list[Seam], run_python: RunPython
) -> None:
    answer = run_python("-c", source("print_hooks"))
    assert answer.returncode == 0, answer.stderr
    rows = answer.stdout.splitlines()
    expected = {line.removeprefix("row ") for line in rows if line.startswith("row ")}
    assert {f"{s.name} {s.detail}".strip() for s in seams if s.kind is Kind.HOOK} == expected


def test_check_sglang_finds_every_renamed_seam(
    seams: list[Seam], pinned: Sources, sglang: Files, ours: Files
) -> None:
    """All that a file defines is renamed in it, one file after another."""
    by_file: dict[str, list[Seam]] = defaultdict(list)
    for seam in seams:
        if seam.kind in BY_CLASS and seam.name != SERVER_ARGS:
            found = pinned.resolve(seam.name) or pinned.server_field(seam.name.split(".")[-1])
            assert found is not None, seam
            by_file[found.module.file].append(seam)
    assert len(by_file) > 50
    for file, those in by_file.items():
        text = sglang.read(file)
        assert text is not None
        names = {each.name.rpartition(".")[2] for each in those} - {"__init__"}
        renamed = re.sub(rf"\b({'|'.join(names)})\b", r"\1_renamed", text) if names else text
        edited = Sources({"sglang": Edited(sglang, file, renamed), OURS: ours})
        those = [each for each in those if not each.name.endswith(".__init__")]
        those = [each for each in those if pinned.module(each.name) is None]
        for finding in compare(those, pinned, edited, PATCHES):
            inherited = finding.seam.name.startswith(OVERRIDES)
            wanted = Verdict.READ_AGAIN if inherited else Verdict.GONE
            assert finding.verdict is wanted, finding
        missing = Sources({"sglang": Edited(sglang, file, None), OURS: ours})
        for finding in compare(by_file[file], pinned, missing, PATCHES):
            assert finding.verdict is Verdict.GONE, finding


def test_check_sglang_finds_changed_bodies_of_hooks_and_overrides(
    seams: list[Seam], pinned: Sources, sglang: Files, ours: Files
) -> None:
    checked = 0
    for seam in seams:
        found = pinned.resolve(seam.name) if seam.kind in (Kind.HOOK, Kind.OVERRIDE) else None
        node = found.nodes[0] if found is not None and found.nodes else None
        if found is None or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = sglang.read(found.module.file)
        line, column = node.body[-1].lineno, node.body[-1].col_offset
        assert text is not None
        lines = text.splitlines(keepends=True)
        before = lines[line - 1]
        lines[line - 1] = f"{before[:column]}assert self is not None; {before[column:]}"
        is_compound = re.match(r"\s*(if|for|while|with|try|async|@|def|class)\b", before)
        if (is_compound and not before[:column].strip()) or column == 0:
            lines[line - 1] = f"{' ' * column}assert True\n{before}"
        edited = Sources({"sglang": Edited(sglang, found.module.file, "".join(lines)), OURS: ours})
        (finding,) = compare([seam], pinned, edited, PATCHES)
        assert finding.verdict is Verdict.READ_AGAIN, finding
        checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("def f(self, a): ...", "def f(self, a): return 1", Verdict.READ_AGAIN),
        ("def f(self, a): ...", "def f(self, b): ...", Verdict.CHANGED),
        ("def f(self, a): ...", "def f(self, a, b): ...", Verdict.CHANGED),
        ("def f(self, a): ...", "def f(self, a: int): ...", Verdict.SAME),
        ("def f(self, a): ...", 'def f(self, a):\n        """Text."""\n        ...', Verdict.SAME),
        ("def f(self, a): ...", "async def f(self, a): ...", Verdict.CHANGED),
        ("def f(self, a): ...", "@property\n    def f(self, a): ...", Verdict.CHANGED),
        ("def f(self, a): ...", "def g(self, a): ...", Verdict.GONE),
        ("def f(self, a): ...", "def f(self, a): ...\n    def mine(self): ...", Verdict.CHANGED),
        (
            "def f(self, a): ...",
            "def f(self, a): ...\n    def other(self): ...",
            Verdict.READ_AGAIN,
        ),
    ],
)
def test_check_sglang_verdicts_on_an_overridden_method(
    tmp_path: Path, before: str, after: str, verdict: Verdict
) -> None:
    assert worst(tmp_path, before, after) is verdict


def worst(folder: Path, before: str, after: str) -> Verdict:
    """The worst verdict on a class whose body was one and is another."""
    package = folder / "ours" / OURS
    package.mkdir(parents=True)
    (package / "host.py").write_text(
        "from sglang.srt.thing import Thing\n"
        "class Mine(Thing):\n    def f(self, a): super().f(a)\n    def mine(self): ...\n"
    )
    ours, sources = Files(folder / "ours"), []
    for name, body in (("before", before), ("after", after)):
        fields = folder / name / "sglang/srt/arg_groups/fields"
        fields.mkdir(parents=True)
        (folder / name / "sglang/srt/thing.py").write_text(f"class Thing:\n    {body}\n")
        (folder / name / "sglang/lang").mkdir()
        sources.append(Sources({"sglang": Files(folder / name), OURS: ours}))
    findings = compare(find_seams(sources[0], {}), sources[0], sources[1], {})
    return min((finding.verdict for finding in findings), key=list(Verdict).index)


def test_patch_fits_if_its_lines_occur_exactly_once() -> None:
    patch = "# target: x\n--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n"
    assert patch_fits(patch, "0\na\nb\nc\n")
    assert not patch_fits(patch, "a\nb\nd\n")
    assert not patch_fits(patch, "a\nb\nc\na\nb\nc\n")
