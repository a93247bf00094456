"""``sglang-elora check-sglang``: check another SGLang for the code that this package relies on."""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files as resources
from pathlib import Path
from zipfile import BadZipFile

from sglang_elora.upstream.comparison import Finding, UnknownSeam, Verdict, compare
from sglang_elora.upstream.seams import OURS, find_seams
from sglang_elora.upstream.sources import Files, Sources


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 if a place is gone or changed."""
    parser = argparse.ArgumentParser(prog="sglang-elora check-sglang", description=__doc__)
    parser.add_argument("wheel", type=Path, help="SGLang's wheel, or a folder with sglang/ in it")
    parser.add_argument(
        "--pinned",
        type=Path,
        help="the SGLang that this package is for, likewise (default: the installed one)",
    )
    parser.add_argument(
        "--also", type=Path, nargs="*", default=(), help="folders whose imports count too"
    )
    parser.add_argument("--all", action="store_true", help="show what is unchanged, too")
    options = parser.parse_args(argv)
    try:
        findings = check(options.wheel, options.pinned or _folder_of("sglang"), options.also)
    except (OSError, BadZipFile, UnknownSeam, ModuleNotFoundError) as error:
        parser.error(str(error))
    for line in report(findings, shows_all=options.all):
        print(line)
    return int(any(f.verdict in (Verdict.GONE, Verdict.CHANGED) for f in findings))


def check(wheel: Path, pinned: Path, also: Iterable[Path] = ()) -> list[Finding]:
    """Findings for ``wheel``, compared with ``pinned``: each a wheel or a folder with ``sglang/``.

    Args:
        also: Folders of further scripts whose imports count too.
    """
    ours = Files(_folder_of(OURS))
    before, after = (Sources({"sglang": Files(path), OURS: ours}) for path in (pinned, wheel))
    patches = {
        path.name: path.read_text()
        for path in resources("sglang_elora.patches").iterdir()
        if path.name.endswith(".patch")
    }
    scripts = {str(path): path.read_text() for each in also for path in sorted(each.rglob("*.py"))}
    return compare(find_seams(before, patches, scripts), before, after, patches)


def report(findings: Iterable[Finding], *, shows_all: bool = False) -> list[str]:
    """Lines of a readable report, worst verdict first, grouped by place."""
    findings = list(findings)
    lines = []
    for verdict in Verdict:
        if verdict is Verdict.SAME and not shows_all:
            continue
        places: dict[str, list[Finding]] = {}
        for each in findings:
            if each.verdict is verdict:
                places.setdefault(each.seam.name, []).append(each)
        lines += [f"{verdict.value} ({len(places)}):"] if places else []
        for name, those in places.items():
            uses = dict.fromkeys(f"{each.seam.kind.value} {each.seam.used_in}" for each in those)
            lines.append(f"  {name}  ({', '.join(uses)})")
            texts = dict.fromkeys(text for each in those for text in each.differences)
            lines += [f"      {text}" for text in texts]
    counts = Counter(each.verdict for each in findings)
    numbers = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    return [*lines, f"{len(findings)} uses: {numbers}"]


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parents[1]


if __name__ == "__main__":
    raise SystemExit(main())
