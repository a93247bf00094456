"""Writes the tables in docs/ that the code knows.

    python docs/tables.py           # write them
    python docs/tables.py --check   # exit status 1 if a page differs from the code

A table stands between the markers ``<!-- begin generated: NAME -->`` and ``<!-- end generated:
NAME -->``. The table of refused features needs SGLang to import; ``--only NAME`` leaves it out.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from sglang_elora.config import EloraConfig, variable_of
from sglang_elora.control.metrics import metric_rows

DOCS = Path(__file__).parent
COMMAND = "python docs/tables.py"

_CODE = re.compile(r"(?<![\w`-])(--[a-z][\w-]*|SGLANG_\w+=\w+)|'([\w.-]+)'")


def flags() -> Iterator[str]:
    """Flags and environment variables of ``EloraConfig``."""
    yield from _header("flag", "environment variable", "default", "what it does")
    for item in fields(EloraConfig):
        default = "off" if item.default is False else str(item.default)
        code = f"`{default}`" if default else ""
        flag, text = item.metadata["flag"], _marked(item.metadata["help"])
        yield _row(f"`{flag}`", f"`{variable_of(item)}`", code, text)


def metrics() -> Iterator[str]:
    """Metrics on the server's ``/metrics``."""
    yield from _header("metric", "type", "label", "what it is")
    for row in metric_rows():
        labels = ", ".join(f"`{label}`" for label in row.labels)
        yield _row(f"`{row.name}`", row.kind, labels, row.text)


def refusals() -> Iterator[str]:
    """Features of SGLang that end a start with ``--elora``."""
    from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

    ensure_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's, about packages that a CPU machine lacks
        from sglang_elora.srt.arguments.compatibility import REFUSALS

    yield from _header("flag or model", "reason", "what to do", "without LoRA")
    for refusal in REFUSALS:
        name = re.sub(r" ?\{cfg\.[^}]*\}", f" {refusal.values}".rstrip(), refusal.name)
        without_lora = "accepted" if refusal.with_lora_only else "refused"
        yield _row(_marked(name), _marked(refusal.why), _marked(refusal.remedy), without_lora)


TABLES: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
    "flags": ("flags.md", flags),
    "metrics": ("control.md", metrics),
    "refusals": ("compatibility.md", refusals),
}


def with_table(page: str, name: str, lines: Iterable[str]) -> str:
    """The text of a page with its table replaced.

    Raises:
        ValueError: The page has no such markers, or has them twice.
    """
    begin, end = f"<!-- begin generated: {name} -->\n", f"<!-- end generated: {name} -->\n"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"need once each: {begin.strip()} and {end.strip()}")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return "".join([before, begin, *(f"{line}\n" for line in lines), end, after])


def outdated(names: Iterable[str], *, write: bool = False) -> list[str]:
    """Names of the tables that differ from the code; with ``write`` they are replaced."""
    found = []
    for name in names:
        file, make = TABLES[name]
        page = (DOCS / file).read_text(encoding="utf-8")
        generated = with_table(page, name, make())
        if page != generated:
            found.append(name)
            if write:
                (DOCS / file).write_text(generated, encoding="utf-8")
    return found


def _header(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*("---" for _ in names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _marked(text: str) -> str:
    """Flags, variables and quoted values as code."""
    return _CODE.sub(lambda match: f"`{match[1] or match[2]}`", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page differs")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES))
    arguments = parser.parse_args()
    names = outdated(arguments.only, write=not arguments.check)
    for name in names:
        state = "differs from the code: run" if arguments.check else "written by"
        print(f"docs/{TABLES[name][0]}, table {name!r}: {state} {COMMAND}")
    return int(arguments.check and bool(names))


if __name__ == "__main__":
    sys.exit(main())
