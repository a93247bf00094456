"""Write the sha256 of every file that may be installed into the locks beside this tool.

Run `.venv/bin/python requirements/lock.py` after a version in a lock was changed or a line added:
one line `name==version` is enough, its hashes follow. The files are those that pip's index has of
that version for CPython 3.11 to 3.13 on Linux and macOS (64-bit Intel and ARM), and the source.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

from packaging.tags import Tag
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

FOLDER = Path(__file__).parent
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
JSON = "application/vnd.pypi.simple.v1+json"
PYTHONS = range(11, 14)
PLATFORM = re.compile(
    r"any|(manylinux|linux)\w*_(x86_64|aarch64)|macosx\w*_(x86_64|arm64|universal2)"
)
# Files that are not on that index: builds for the CPU from PyTorch's own, which the Makefile takes
# where one of pip's folders (find-links) holds them. `pip hash FILE` prints what belongs here.
ELSEWHERE = {
    "torch==2.13.0": [  # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    ],
}


def fits(tag: Tag) -> bool:
    """Whether a wheel with this tag can be installed on a machine that the locks are for."""
    python = re.fullmatch(r"(?:cp|py)3(\d*)", tag.interpreter)
    if python is None or PLATFORM.fullmatch(tag.platform) is None:
        return False
    minor = int(python[1] or 0)
    if tag.abi == "abi3" or tag.interpreter.startswith("py"):
        return minor < PYTHONS.stop
    return minor in PYTHONS and tag.abi in (f"cp3{minor}", "none")


def wanted(filename: str, version: Version) -> bool:
    """Whether a file of the index is of this version and of use on a machine of the locks."""
    try:
        if filename.endswith(".whl"):
            _, found, _, tags = parse_wheel_filename(filename)
            return found == version and any(map(fits, tags))
        return parse_sdist_filename(filename)[1] == version
    except (InvalidWheelFilename, InvalidSdistFilename):
        return False


def hashes(requirement: str) -> list[str]:
    """The sha256 of all files that `name==version` may be installed from."""
    name, _, version = requirement.partition("==")
    url = f"{INDEX.rstrip('/')}/{canonicalize_name(name)}/"
    with urlopen(Request(url, headers={"Accept": JSON}), timeout=60) as answer:
        files = json.load(answer)["files"]
    found = [f["hashes"]["sha256"] for f in files if wanted(f["filename"], Version(version))]
    if not found:
        raise SystemExit(f"{requirement}: no file of that version is on {INDEX}")
    return sorted(found + ELSEWHERE.get(requirement, []))


def rewritten(lines: list[str]) -> Iterator[str]:
    """The lines of a lock, each requirement with the hashes that it has now."""
    for line in lines:
        if line.lstrip().startswith("--hash="):
            continue
        if not line or line.startswith("#"):
            yield line
            continue
        entry = line.rstrip("\\ ")
        found = hashes(entry.partition(";")[0].strip())
        yield " \\\n".join([entry, *(f"    --hash=sha256:{value}" for value in found)])


def main() -> None:
    """Rewrite all locks."""
    for path in sorted(FOLDER.glob("*.lock")):
        path.write_text("\n".join(rewritten(path.read_text().splitlines())) + "\n")
        print(path.name)


if __name__ == "__main__":
    main()
