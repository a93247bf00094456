"""``sglang-elora doctor`` reports the state of the installation and a remedy per problem."""

from __future__ import annotations

from pathlib import Path

from sglang_elora.config import SGLANG_PIN
from tests.harness.plugin_packages import write_plugin
from tests.harness.run_python import RunPython

DOCTOR = ("-m", "sglang_elora.commands.cli", "doctor")


def test_doctor_passes_on_a_ready_machine(run_fresh_python: RunPython) -> None:
    result = run_fresh_python(*DOCTOR)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert f"[  ok] sglang: {SGLANG_PIN}, as pinned" in result.stdout
    assert "sglang.srt.lora.lora.LoRAAdapter.__init__" in result.stdout
    assert "01-cache-namespace.patch" in result.stdout
    assert "would be applied by --elora" in result.stdout
    assert result.stdout.rstrip().endswith("Ready.")


def test_doctor_reports_all_problems_at_once(run_fresh_python: RunPython, tmp_path: Path) -> None:
    write_plugin(tmp_path, "vandal", "pass")
    (tmp_path / "sitecustomize.py").write_text(
        "from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable\n"
        "ensure_torchvision_importable()\n"
        "from sglang.srt.lora.lora import LoRAAdapter\n"
        "del LoRAAdapter._normalize_weights\n"
    )
    result = run_fresh_python(
        *DOCTOR, path=tmp_path, SGLANG_ELORA="perhaps", SGLANG_PLUGINS="vandal"
    )
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    failures = [line for line in lines if line.startswith("[FAIL]")]
    assert any("SGLANG_ELORA) must be 1 or 0, got 'perhaps'" in line for line in failures)
    assert any("SGLANG_PLUGINS='vandal' leaves out 'elora'" in line for line in failures)
    assert any("LoRAAdapter._normalize_weights is not there" in line for line in failures)
    assert all(lines[lines.index(line) + 1].startswith("       -> ") for line in failures)
    assert "'elora' is registered, beside vandal" in result.stdout
    assert lines[-1] == f"{len(failures)} problem(s) to solve before a start."


def test_doctor_reports_an_import_missing_from_sglang(
    run_fresh_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable\n"
        "ensure_torchvision_importable()\n"
        "from sglang.srt.lora import utils\n"
        "del utils.capturing_lora_graph\n"
    )
    result = run_fresh_python(*DOCTOR, path=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "[FAIL] seam: a name that ELORA uses is missing from SGLang: " in result.stdout
    assert "capturing_lora_graph" in result.stdout
