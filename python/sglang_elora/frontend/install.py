"""Installation of the frontend language's adapters: preflight, apply, verify; once per process."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_elora.srt.install.hook import When
from sglang_elora.srt.install.patching import Patch, apply_patch, load_patches, preflight
from sglang_elora.srt.install.verify import (
    SeamError,
    hook_problems,
    not_in_effect,
    report,
    version_problems,
)


def lang_patches() -> tuple[Patch, ...]:
    return tuple(patch for patch in load_patches() if When(patch.when) is When.LANG)


def turn_on() -> None:
    """Apply the frontend language's patches and hooks in this process. Idempotent.

    Raises:
        SeamError: A target is missing or differs, or another plugin has replaced it.
    """
    patches = lang_patches()
    problems = version_problems()
    for patch in patches:
        problems += preflight(patch)
    _stop_at(problems, "cannot be installed")
    for patch in patches:
        apply_patch(patch)
    # NOTE: imported after patching: hooks wrap the patched functions and name their parameters.
    from sglang_elora.frontend.hooks import HOOKS

    if not_in_effect(HOOKS, ()):
        _stop_at([text for hook in HOOKS for text in hook_problems(hook)], "cannot be installed")
        for hook in HOOKS:
            HookRegistry.register(hook.target, hook.body, hook.kind)
        HookRegistry.apply_hooks()
    _stop_at(not_in_effect(HOOKS, patches), "is not in effect")


def _stop_at(problems: list[str], what: str) -> None:
    if problems:
        raise SeamError(report(what, problems, without="sglang_elora.lang"))
