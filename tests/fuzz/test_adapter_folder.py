"""A short search for adapter folders that the check of adapters neither serves nor refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_fuzzed_adapter_folder_is_served_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.adapter_folder"]
    command += ["--seconds", str(SECONDS), "--seed", "1"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, str(tmp_path / "corpus")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS + 180,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    found = re.search(r"(\d+) executions: (\d+) accepted, (\d+) refused", done.stdout)
    assert found is not None, output[-8000:]
    accepted, refused = int(found[2]), int(found[3])
    assert accepted and refused, found[0]
