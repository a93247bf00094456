"""With the package installed but not enabled, SGLang is unchanged."""

from __future__ import annotations

from tests.harness.programs import source
from tests.harness.run_python import RunPython


def test_sglang_is_untouched_when_elora_is_off(run_fresh_python: RunPython) -> None:
    result = run_fresh_python("-c", source("inert"))
    assert result.returncode == 0, result.stderr
    assert "untouched" in result.stdout


def test_torch_is_untouched_when_the_cpu_platform_declines(run_fresh_python: RunPython) -> None:
    result = run_fresh_python("-c", source("inert_torch"), SGLANG_USE_CPU_ENGINE="1")
    assert result.returncode == 0, result.stderr
    assert "untouched" in result.stdout


def test_inert_check_fails_when_elora_is_on(run_fresh_python: RunPython) -> None:
    """The test above can fail: with ELORA on, it does."""
    result = run_fresh_python("-c", source("inert"), SGLANG_ELORA="1")
    assert result.returncode != 0
    assert "AssertionError: sglang.srt." in result.stderr
