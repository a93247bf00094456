"""The GPU scripts run to completion, in tiny sizes under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _command(script: str, out: Path) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{script}", "--out", str(out)]


def dry_run(script: str, out: Path, *options: str) -> None:
    command = [*_command(script, out), "--dry-run", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_gpu_kernels_script_dry_run_writes_all_results(tmp_path: Path) -> None:
    dry_run("kernels", tmp_path)
    read = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(read) == {"facts", "graphs", "page_copy", "times", "experts", "summary"}
    assert read["summary"]["targets"]["graph_replay_right"] is True
    assert read["summary"]["round_trip_right"] is True
    modules = [module for row in read["times"]["rows"] for module in row["modules"].values()]
    assert modules and all(module["wrong"] == {"both/scattered": 0.0} for module in modules)
    experts = read["experts"]["rows"]
    assert {name for row in experts for name in row["wrong"]} == {
        f"{module}_proj_moe/{way}"
        for module in ("gate_up", "down")
        for way in ("single", "grouped 16", "grouped 64")
    }
    assert all(set(row["wrong"].values()) == {0.0} for row in experts)
    assert all(min(row["bytes"].values()) > 0 for row in experts)
    assert not any("times" in row for row in (*modules, *experts)), "nothing is timed on a CPU"


def test_gpu_copies_script_dry_run_reads_the_right_bytes(tmp_path: Path) -> None:
    dry_run("copies", tmp_path, "--rounds", "2")
    read = json.loads((tmp_path / "copies.json").read_text())
    assert read["old_bytes_are_read"] == read["layers_are_awaited"] == [True] * 3
    assert len(read["times"]["launch_s"]) == 2


def test_gpu_tune_script_dry_run_covers_every_default_config(tmp_path: Path) -> None:
    dry_run("tune", tmp_path)
    tuned = json.loads((tmp_path / "cpu.json").read_text())
    default = json.loads((ROOT / "kernels/launch_configs/default.json").read_text())
    assert tuned.keys() == default.keys()
    for half, entries in tuned.items():
        assert entries
        for entry in entries:
            assert entry["launch"].keys() == default[half][0]["launch"].keys()
            assert entry["shape"].keys() == default[half][0]["shape"].keys()


@pytest.mark.parametrize("script", ["kernels", "tune"])
def test_gpu_scripts_measure_nothing_without_a_gpu(script: str, tmp_path: Path) -> None:
    command = _command(script, tmp_path / "out")
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=hidden, cwd=ROOT
    )
    assert done.returncode == 2
    assert "needs a GPU" in done.stdout
    assert not (tmp_path / "out").exists()
