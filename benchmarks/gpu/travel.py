"""Size of the files that a call to the GPU machine transfers: the tracked tree and the bundle.

    python -m benchmarks.gpu.travel [BUNDLE_DIR]

Prints each top folder's size and the sum, and exits with status 1 if the sum exceeds ``LIMIT_MIB``.
Git's history is not transferred; untracked files that git does not ignore are, and are counted.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LIMIT_MIB = 60
"""MiB. The machine's own limit is 64; the difference is room for what a transfer adds."""


def tree_files(root: Path = ROOT) -> list[Path]:
    """Files of the checkout that git tracks or does not ignore, relative to ``root``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [path for path in map(Path, filter(None, listed.split("\0"))) if (root / path).is_file()]


def bundle_bytes(folder: Path) -> int:
    """Bytes of all files under ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sizes(bundle: Path | None = None, root: Path = ROOT) -> Counter[str]:
    """Bytes by top folder of the tree, and of the bundle under the key ``bundle``."""
    found: Counter[str] = Counter()
    for path in tree_files(root):
        found[path.parts[0]] += (root / path).stat().st_size
    if bundle is not None:
        found["bundle"] = bundle_bytes(bundle)
    return found


def fits(found: Counter[str], limit_mib: float = LIMIT_MIB) -> bool:
    return sum(found.values()) <= limit_mib * MIB


def main() -> None:
    bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if bundle is not None and not bundle_bytes(bundle):
        raise SystemExit(f"{bundle} holds no bundle: run benchmarks/gpu/bundle.sh {bundle}")
    found = sizes(bundle)
    for name, size in found.most_common():
        if size >= MIB / 10:
            print(f"{size / MIB:8.2f} MiB  {name}")
    total = sum(found.values()) / MIB
    print(f"{total:8.2f} MiB  in all; {LIMIT_MIB} MiB may travel")
    if not fits(found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
