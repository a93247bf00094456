"""How soon a server ends that has lost one of its processes."""

from __future__ import annotations

import shutil
from collections.abc import MutableMapping


def end_without_empty_diagnostics(environ: MutableMapping[str, str]) -> None:
    """Have SGLang end at once when a process of its own has died, which its watchdog sees within a
    second, unless there is something to be learned from the others.

    It would wait a minute for core dumps, which CUDA writes only where
    ``CUDA_ENABLE_USER_TRIGGERED_COREDUMP`` was set, and call py-spy, which may not be installed;
    clients wait that long for answers that cannot come. What the user has set stays.
    """
    if environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "0") == "0":
        environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
    if shutil.which("py-spy", path=environ.get("PATH")) is None:
        environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")
