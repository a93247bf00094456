"""Dry runs of the GPU stages that start servers, on the CPU platform.

Each takes a minute or more, so CI runs one; PRESSURE_FULL=1 in the environment runs all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = (*range(4, 11), 12) if "PRESSURE_FULL" in os.environ else (7,)
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUN)
def test_gpu_server_stage_dry_run_succeeds(stage: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.stages", str(stage), "--dry-run"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "right: " in done.stdout and "WRONG" not in done.stdout
    rows = (tmp_path / f"stage-{stage}.jsonl").read_text().splitlines()
    assert rows and all(json.loads(row)["status"] == "ended" for row in rows)
