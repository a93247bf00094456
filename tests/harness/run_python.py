"""The type of the fixtures ``run_python`` and ``run_fresh_python``."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
