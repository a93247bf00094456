"""With the package installed and nothing asked for, SGLang is SGLang."""

from __future__ import annotations

from tests.harness.run_python import RunPython

UNTOUCHED = """
import pkgutil
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
ensure_torchvision_importable()
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_elora.srt.install.hooks import HOOKS as SERVER
from sglang_elora.frontend.hooks import HOOKS as LANG
from sglang_elora.srt.install.patching import is_applied, load_patches

def raw(target):
    owner, _, name = target.rpartition(".")
    return vars(pkgutil.resolve_name(owner))[name]

def code(function):
    return getattr(function, "__code__", None)  # a class has none

HOOKS = SERVER + LANG
before = {hook.target: (raw(hook.target), code(raw(hook.target))) for hook in HOOKS}
apply_hooks = vars(HookRegistry)["apply_hooks"]
load_plugins()
assert SERVER and LANG and load_patches(), "the tables are empty: nothing was tested"
for target, (function, own_code) in before.items():
    assert raw(target) is function, target
    assert code(function) is own_code, target
for patch in load_patches():
    assert not is_applied(patch), patch.name
assert vars(HookRegistry)["apply_hooks"] is apply_hooks
assert not HookRegistry._hooks, dict(HookRegistry._hooks)
print("untouched", len(before))
"""

TORCH_UNTOUCHED = """
import torch
before = {name: getattr(torch, name) for name in dir(torch)}
pin_memory, stream, event = torch.Tensor.pin_memory, torch.cpu.Stream, torch.cpu.Event
import sglang_elora.plugin
sglang_elora.plugin.load()
assert sglang_elora.plugin.activate_cpu_platform() is None
assert all(getattr(torch, name) is value for name, value in before.items())
assert (torch.Tensor.pin_memory, torch.cpu.Stream, torch.cpu.Event) == (pin_memory, stream, event)
print("untouched")
"""


def test_no_hook_and_no_patch_is_applied(run_fresh_python: RunPython) -> None:
    result = run_fresh_python("-c", UNTOUCHED)
    assert result.returncode == 0, result.stderr
    assert "untouched" in result.stdout


def test_where_the_cpu_platform_declines_torch_is_untouched(run_fresh_python: RunPython) -> None:
    result = run_fresh_python("-c", TORCH_UNTOUCHED, SGLANG_USE_CPU_ENGINE="1")
    assert result.returncode == 0, result.stderr
    assert "untouched" in result.stdout


def test_the_same_process_with_elora_is_touched(run_fresh_python: RunPython) -> None:
    """The test above can fail: with ELORA on, it does."""
    result = run_fresh_python("-c", UNTOUCHED, SGLANG_ELORA="1")
    assert result.returncode != 0
    assert "AssertionError: sglang.srt." in result.stderr
