"""Pack and unpack the raw rows of all benchmarks: `rows.tar.xz` in this folder.

    python benchmarks/results/rows.py unpack [FOLDER ...]
    python benchmarks/results/rows.py pack
    python benchmarks/results/rows.py list

Tables, texts and plots are in the folders; the rows that they were computed from are in the
archive. `unpack` writes rows to the paths that the texts name (git ignores them), for all folders
or only those given, for example `serving/load-1`. `pack` adds unpacked files to the archive: they
replace files of the same name; other files of the archive are kept. With the same version of xz,
the same rows yield the same archive, byte for byte. Files that end in `.gz` are uncompressed in the
archive, which makes it 40% smaller; `unpack` compresses them again.
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCHIVE = FOLDER / "rows.tar.xz"
SUFFIXES = (".gz", ".json", ".jsonl")
TABLES = ("serving/calibration.json", "serving/calibration-8-layers.json")
"""Small files of these suffixes that stay in the tree: fit.py and the benchmarks read them."""


def read(archive: Path) -> dict[str, bytes]:
    """The rows in an archive, by their path below this folder; none if there is no archive."""
    if not archive.exists():
        return {}
    with tarfile.open(archive) as tar:
        found = {item.name: tar.extractfile(item).read() for item in tar}  # type: ignore[union-attr]
    return {
        name: gzip.compress(content, mtime=0) if name.endswith(".gz") else content
        for name, content in found.items()
    }


def write(rows: Mapping[str, bytes], archive: Path) -> None:
    """Write an archive that depends on names and contents only."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, row in sorted(rows.items()):
            plain = gzip.decompress(row) if name.endswith(".gz") else row
            item = tarfile.TarInfo(name)  # mode 644; mtime, uid and gid 0
            item.size = len(plain)
            tar.addfile(item, io.BytesIO(plain))
    partial = archive.with_suffix(".partial")
    partial.write_bytes(lzma.compress(content.getvalue(), preset=9))
    os.replace(partial, archive)


def lying(folder: Path) -> dict[str, bytes]:
    """The unpacked rows in a folder, by their path relative to it."""
    paths = (path for path in folder.rglob("*") if path.name.endswith(SUFFIXES))
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if name not in TABLES}


def chosen(rows: Mapping[str, bytes], folders: Sequence[str]) -> dict[str, bytes]:
    """The rows in the named folders, or all rows if none is named.

    Raises:
        SystemExit: The archive has no rows below a folder.
    """
    starts = [f"{folder.strip('/')}/" for folder in folders]
    for start in starts:
        if not any(name.startswith(start) for name in rows):
            raise SystemExit(f"no rows of {start} are in {ARCHIVE.name}: see `rows.py list`")
    return {name: rows[name] for name in rows if not starts or name.startswith(tuple(starts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack", help="put the rows that lie here into the archive")
    for name, text in (("unpack", "write rows to their folders"), ("list", "names and bytes")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folders", nargs="*", metavar="FOLDER", help="only these")
    options = parser.parse_args()
    if options.command == "pack":
        rows = read(ARCHIVE) | lying(FOLDER)
        write(rows, ARCHIVE)
        print(f"{len(rows)} files, {ARCHIVE.stat().st_size:,} bytes: {ARCHIVE}")
        return
    for name, content in chosen(read(ARCHIVE), options.folders).items():
        if options.command == "unpack":
            path = FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        print(f"{len(content):>9,} {name}")


if __name__ == "__main__":
    main()
