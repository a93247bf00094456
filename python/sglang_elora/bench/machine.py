"""Facts of the machine and versions that a row was measured with."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "sglang", "sglang-elora")
_HOST_FILES = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id")


def machine() -> dict[str, str]:
    return {
        "when": now(),
        "host": host_id(),
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_id() -> str:
    """An id of this machine since it was started.

    These are 12 hex digits of a SHA-256 of ``/etc/machine-id``, the kernel's boot id, the CPU's
    name and the number of CPUs.
    Virtual machines made from one image have the same machine id, so the boot id is part of it; a
    restarted machine has a new id.
    """
    files = map(Path, _HOST_FILES)
    parts = [path.read_text().strip() for path in files if path.exists()]
    parts += [_cpu_model(), str(os.cpu_count())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def is_dirty(commit: str) -> bool:
    """Whether a commit as ``commit`` returns it is of a tree with changes."""
    return commit.endswith("-dirty")


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line for line in lines if "model name" in line), ":")
    return found.partition(":")[2].strip() or platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of a folder's checkout, by default this file's, with "-dirty" if tracked files
    have changes; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"
