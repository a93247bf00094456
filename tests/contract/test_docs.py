"""The table of refused features in docs/compatibility.md is what the code refuses."""

from __future__ import annotations

from pathlib import Path

from tests.harness.run_python import RunPython

TABLES = Path(__file__).parents[2] / "docs" / "tables.py"


def test_table_of_refusals_is_up_to_date(run_fresh_python: RunPython) -> None:
    result = run_fresh_python(str(TABLES), "--check", "--only", "refusals")
    assert result.returncode == 0, result.stdout + result.stderr
