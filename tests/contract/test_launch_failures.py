"""A seam that differs from the pinned SGLang fails the launch, and the message names it."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from sglang_elora.config import SGLANG_PIN
from tests.harness.plugin_packages import write_plugin
from tests.harness.programs import source
from tests.harness.run_python import RunPython

LAUNCH = ("-m", "sglang_elora.launch_server", "--elora", "--model-path", "no-such-model")
TARGET = "sglang.srt.lora.lora.LoRAAdapter._normalize_weights"
PATCHED_FILE = "srt/managers/schedule_batch.py"


@pytest.fixture
def sglang_copy(tmp_path: Path) -> Path:
    """A folder whose ``sglang`` is the installed one, file by file as links."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    shutil.copytree(source, tmp_path / "sglang", copy_function=os.symlink)
    return tmp_path


def test_launch_fails_on_a_missing_hook_target(run_python: RunPython, tmp_path: Path) -> None:
    write_plugin(
        tmp_path,
        "vandal",
        "from sglang.srt.lora.lora import LoRAAdapter\ndel LoRAAdapter._normalize_weights",
    )
    result = run_python(*LAUNCH, path=tmp_path)
    assert result.returncode != 0
    assert f"hook target {TARGET} is not there" in result.stderr
    assert f"sglang=={SGLANG_PIN}" in result.stderr


def test_launch_fails_on_a_changed_hook_signature(run_python: RunPython, tmp_path: Path) -> None:
    write_plugin(
        tmp_path,
        "vandal",
        "from sglang.srt.lora.lora import LoRAAdapter\n"
        "LoRAAdapter._normalize_weights = lambda adapter, strict: None",
    )
    result = run_python(*LAUNCH, path=tmp_path)
    assert result.returncode != 0
    assert f"hook target {TARGET} takes ('adapter', 'strict')" in result.stderr


def test_launch_fails_on_a_changed_patched_file(run_python: RunPython, sglang_copy: Path) -> None:
    file = sglang_copy / "sglang" / PATCHED_FILE
    text = file.read_text()
    file.unlink()  # the link, not what it points to
    file.write_text(text + "# one line more\n")
    result = run_python(*LAUNCH, path=sglang_copy)
    assert result.returncode != 0
    assert PATCHED_FILE in result.stderr
    assert "sha256" in result.stderr
    assert f"sglang=={SGLANG_PIN}" in result.stderr


def test_launch_fails_if_sglang_plugins_omits_elora(run_python: RunPython) -> None:
    result = run_python(*LAUNCH, SGLANG_PLUGINS="something_else")
    assert result.returncode != 0
    assert "SGLANG_PLUGINS" in result.stderr


def test_launch_fails_on_a_bad_configuration(run_python: RunPython) -> None:
    result = run_python(*LAUNCH, "--elora-link-gbytes-per-s", "-3")
    assert result.returncode != 0
    assert "--elora-link-gbytes-per-s" in result.stderr


def test_launch_fails_on_a_bad_adapter_with_bad_adapter_exit(
    run_python: RunPython, checkpoint: Path
) -> None:
    result = run_python(
        *("-m", "sglang_elora.launch_server", "--elora", "--elora-bad-adapter", "exit"),
        *("--model-path", str(checkpoint), "--enable-lora"),
        *("--lora-paths", f"law={checkpoint}"),
    )
    assert result.returncode != 0
    assert "LoRA adapter 'law'" in result.stderr
    assert "adapter_config.json" in result.stderr


def test_launch_fails_if_every_adapter_is_bad(run_python: RunPython, checkpoint: Path) -> None:
    result = run_python(
        *("-m", "sglang_elora.launch_server", "--elora", "--model-path", str(checkpoint)),
        *("--enable-lora", "--lora-paths", f"law={checkpoint}"),
    )
    assert result.returncode != 0
    assert "Not served: LoRA adapter 'law'" in result.stderr
    assert "--max-lora-rank and --lora-target-modules" in result.stderr


def test_second_plugin_hook_on_the_same_method_runs_too(
    run_python: RunPython, tmp_path: Path
) -> None:
    """Through SGLang's registry, before or after ours: both hooks run."""
    write_plugin(
        tmp_path,
        "neighbour",
        f"""
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def around(original, self):
    print("neighbour ran")
    return original(self)
HookRegistry.register({TARGET!r}, around, HookType.AROUND)
""",
    )
    result = run_python("-c", source("second_hook"), path=tmp_path, SGLANG_ELORA="1")
    assert result.returncode == 0, result.stderr
    assert "neighbour ran" in result.stdout
    assert "original ran" in result.stdout
    assert "['gate_proj', 'up_proj']" in result.stdout


@pytest.mark.parametrize("victim", ["hook", "patch"])
def test_launch_fails_if_a_plugin_replaces_a_hooked_or_patched_place(
    victim: str, run_python: RunPython, tmp_path: Path
) -> None:
    """A plugin overwrites a place we hooked: the launch fails and names the place."""
    module, owner, name = {
        "hook": ("sglang.srt.lora.lora", "LoRAAdapter", "_normalize_weights"),
        "patch": ("sglang.srt.managers.schedule_batch", "Req", "__init__"),
    }[victim]
    write_plugin(
        tmp_path,
        "vandal",
        f"""
from sglang.srt.plugins.hook_registry import HookRegistry
from {module} import {owner}
apply = HookRegistry.apply_hooks
def later():
    apply()
    {owner}.{name} = lambda self, *args, **kwargs: None
HookRegistry.apply_hooks = later
""",
    )
    result = run_python(*LAUNCH, path=tmp_path)
    assert result.returncode != 0
    named = {"hook": TARGET, "patch": "schedule_batch.py"}[victim]
    assert named in result.stderr
    assert "another plugin" in result.stderr
