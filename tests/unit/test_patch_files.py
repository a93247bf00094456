"""Parsing and applying diffs, hunk by hunk, and loading a folder of patches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_elora.srt.install.patching import (
    Patch,
    PatchError,
    load_patches,
    patched_source,
)
from tests.harness.diffs import unified

NUMBERED = "".join(f"line {n}\n" for n in range(1, 31))


def _edit(*changes: tuple[str, str]) -> Patch:
    after = NUMBERED
    for old, new in changes:
        after = after.replace(old, new)
    return Patch("01-test.patch", "t.py", "", "", "\n" + unified("t.py", NUMBERED, after))


def test_patch_hunks_apply_in_order() -> None:
    patch = _edit(("line 3\n", ""), ("line 20\n", "line 20\nnew\n"), ("line 30\n", "end\n"))
    after = patched_source(patch, NUMBERED).splitlines()
    assert "line 3" not in after and after[19] == "new" and after[-1] == "end"
    assert len(after) == 30


@pytest.mark.parametrize("number", [17, 18, 19, 20, 21, 22, 23])
def test_patch_requires_every_context_line(number: int) -> None:
    source = NUMBERED.replace(f"line {number}\n", f"line {number} \n")
    with pytest.raises(PatchError, match=f"line {number} of the target is not 'line {number}'"):
        patched_source(_edit(("line 20\n", "new\n")), source)


def test_patch_ignores_lines_outside_its_context() -> None:
    """The hash of the file covers them."""
    patch = _edit(("line 20\n", "new\n"))
    assert "other" in patched_source(patch, NUMBERED.replace("line 2\n", "other\n"))


def test_patch_is_not_applied_at_an_offset() -> None:
    with pytest.raises(PatchError, match="line 17 of the target is not 'line 17'"):
        patched_source(_edit(("line 20\n", "new\n")), "one more\n" + NUMBERED)


def test_patch_of_a_too_short_target_is_refused() -> None:
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


def test_diff_without_context_is_refused() -> None:
    diff = "\n--- a/t.py\n+++ b/t.py\n@@ -3,0 +4,1 @@\n+new\n"
    with pytest.raises(PatchError, match="no context"):
        patched_source(Patch("01-test.patch", "t.py", "", "", diff), NUMBERED)


def test_diff_with_stripped_blank_context_lines_applies() -> None:
    before, after = "a\n\nb\n", "a\n\nc\n"
    diff = unified("t.py", before, after).replace("\n \n", "\n\n")
    assert patched_source(Patch("01.patch", "t.py", "", "", "\n" + diff), before) == after


_texts = st.lists(
    st.sampled_from(["a", "b", " ", "", "@@ -1 +1 @@", "-- a/t.py", "++"]), min_size=1
)


@given(_texts, _texts)
def test_generated_diff_applies_to_the_new_text(old: list[str], new: list[str]) -> None:
    before, after = ("".join(f"{line}\n" for line in lines) for lines in (old, new))
    if before != after:
        patch = Patch("01.patch", "t.py", "", "", "\n" + unified("t.py", before, after))
        assert patched_source(patch, before) == after


# The folder.

HEADER = "# target: a/b.py\n# sha256: 12ab\n# why: Because.\n"


def test_patches_are_loaded_in_name_order(tmp_path: Path) -> None:
    for name in ("02-b.patch", "01-a.patch", "README.md", "__init__.py"):
        (tmp_path / name).write_text(f"{HEADER}--- a/a/b.py\n+++ b/a/b.py\n")
    patches = load_patches(tmp_path)
    assert [patch.name for patch in patches] == ["01-a.patch", "02-b.patch"]
    (first, _) = patches
    assert (first.target, first.sha256, first.why) == ("a/b.py", "12ab", "Because.")
    assert first.when == "--elora"
    assert first.module == "a.b"


def test_patch_header_when_line_is_read(tmp_path: Path) -> None:
    header = f"{HEADER}# when: sglang_elora.lang\n"
    (tmp_path / "01-a.patch").write_text(f"{header}--- a/a/b.py\n+++ b/a/b.py\n")
    assert [patch.when for patch in load_patches(tmp_path)] == ["sglang_elora.lang"]


@pytest.mark.parametrize("field", ["target", "sha256", "why"])
def test_missing_patch_header_line_is_named(field: str, tmp_path: Path) -> None:
    header = "".join(line for line in HEADER.splitlines(True) if field not in line)
    (tmp_path / "01-a.patch").write_text(f"{header}--- a/a/b.py\n+++ b/a/b.py\n# {field}: late\n")
    with pytest.raises(PatchError, match=rf"01-a\.patch .*'{field}'"):
        load_patches(tmp_path)


def test_empty_patch_folder_is_reported_as_a_broken_installation(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="install sglang_elora again"):
        load_patches(tmp_path)


def test_patch_target_init_file_names_its_package() -> None:
    assert Patch("01.patch", "a/b/__init__.py", "", "", "").module == "a.b"
