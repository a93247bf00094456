"""Loads plugins as SGLang does, and fails where one of our hooks or patches is applied."""

import pkgutil

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_elora.frontend.hooks import HOOKS as LANG
from sglang_elora.srt.install.hooks import HOOKS as SERVER
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
