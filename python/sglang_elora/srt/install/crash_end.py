"""Shortens the end of a server after one of its processes has died."""

from __future__ import annotations

import shutil
from collections.abc import MutableMapping


def end_without_empty_diagnostics(environ: MutableMapping[str, str]) -> None:
    """Make SGLang end at once when one of its processes has died, unless diagnostics are possible.

    By default it waits a minute for core dumps, which CUDA writes only if
    ``CUDA_ENABLE_USER_TRIGGERED_COREDUMP`` is set, and calls py-spy, which may not be installed.
    Meanwhile clients wait for answers that cannot arrive. Variables set by the user are kept.
    """
    if environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "0") == "0":
        environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
    if shutil.which("py-spy", path=environ.get("PATH")) is None:
        environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")
